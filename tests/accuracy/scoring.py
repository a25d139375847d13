"""Scores of the bundled checkpoint's tasks through `LLM`."""

from vllm import LLM, SamplingParams
from vllm.benchmarks.tiny_tasks import Item, generate


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
