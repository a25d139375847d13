"""Scores of the bundled checkpoint's tasks: what a change of the engine must not cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.benchmarks.tiny_tasks import Item, generate
from vllm.benchmarks.variants import RUN_TIME
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.entrypoints.llm import LLM

TASKS = ("add2", "add3", "copy", "reverse", "count", "tool", "tool_loop", "parallel")


def answers(llm: LLM, items: list[Item]) -> list[str]:
    """Greedy, thinking off; a "completion" item as bare text, every other through the chat template."""
    tokenizer = llm.get_tokenizer()
    prompts = [
        item.prompt
        if item.prompt is not None
        else tokenizer.apply_chat_template(
            item.messages, tools=item.tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for item in items
    ]
    # A bare sum ends with its line; an answer in a chat ends itself.
    params = [SamplingParams(temperature=0.0, max_tokens=160, stop=["\n"] if item.prompt else None) for item in items]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def accuracy(llm: LLM, kind: str, count: int) -> float:
    """Share of `count` held-out items of a kind that are answered exactly."""
    items = generate(kind, count)
    return sum(item.score(text) for item, text in zip(items, answers(llm, items), strict=True)) / count


def score_tasks(llm: LLM, count: int) -> dict[str, float]:
    """Task -> share of `count` held-out items that are answered exactly; all tasks in one batch."""
    items = [item for kind in TASKS for item in generate(kind, count)]
    right = [item.score(text) for item, text in zip(items, answers(llm, items), strict=True)]
    return {kind: sum(right[i * count : (i + 1) * count]) / count for i, kind in enumerate(TASKS)}


def run_job(spec: dict[str, Any]) -> list[dict[str, float]]:
    """`score_tasks` of the bundled checkpoint for each of the variants, which all change at run time or are one."""
    from vllm.entrypoints.llm import LLM

    llm = LLM("preset:tiny", max_model_len=1024, max_num_seqs=128, use_tqdm_on_load=False, **spec["engine"])
    scores = []
    for settings in spec["settings"]:
        llm.llm_engine.set_gdn_variants(**{RUN_TIME[name]: value for name, value in settings.items()})
        scores.append(score_tasks(llm, spec["count"]))
    return scores
