"""Prompts computed as a CUDA graph would compute them, kernel by kernel: padded, with lengths that only tensors know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm import LLM, SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.model_runner import ModelRunner
from vllm.v1.worker.prompt_batch import PromptBatch

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def runner_of(llm: LLM) -> ModelRunner:
    return llm.llm_engine.core.worker.runner


@contextmanager
def static_prompts(runner: ModelRunner, sizes: tuple[int, ...]) -> Iterator[list[tuple]]:
    """Inside, what graphs would be replayed runs at once. Gives the names and sizes of those, as they come."""
    asked, before = [], (runner.prompt, runner.prompts, runner._prompts_in_graphs)

    def replay(batch, key, run):
        asked.append(key[:2])
        run()

    runner.prompt, runner.prompts = (
        PromptBatch(runner.batch, batch.block_size, batch.max_model_len, sizes, batch.most)
        for batch in (runner.prompt, runner.prompts)
    )
    runner._prompts_in_graphs, runner._replay = True, replay
    try:
        yield asked
    finally:
        del runner._replay
        runner.prompt, runner.prompts, runner._prompts_in_graphs = before


@contextmanager
def recorded_logits(runner: ModelRunner) -> Iterator[list[torch.Tensor]]:
    """Gives all logits that are computed inside, as they come."""
    seen, compute = [], runner.model.compute_logits

    def recording(hidden):
        seen.append(compute(hidden))
        return seen[-1]

    runner.model.compute_logits = recording
    try:
        yield seen
    finally:
        runner.model.compute_logits = compute


def assert_same_logits(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Row by row: a step may be computed in parts."""
    mine, reference = torch.cat(got), torch.cat(want)
    assert mine.shape == reference.shape and mine.isfinite().all()
    most = tolerance * reference.abs().amax(dim=1).clamp(min=1.0)
    assert ((mine - reference).abs().amax(dim=1) <= most).all()


def pools_of(runner: ModelRunner) -> dict[str, list[torch.Tensor]]:
    layers = runner.model.stateful_layers()
    return {
        "pages": [pool for layer in layers.attention for pool in layer.kv_cache],
        "slots": [pool for layer in layers.gdn for pool in (layer.conv_state, layer.ssm_state)],
    }


@contextmanager
def poisoned_pools(runner: ModelRunner) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, all pages and slots hold NaN, and zeros afterwards. Gives them."""
    pools = pools_of(runner)
    for pool in (*pools["pages"], *pools["slots"]):
        pool.fill_(float("nan"))
    yield pools
    for pool in (*pools["pages"], *pools["slots"]):
        pool.zero_()


class ByHand:
    """One sequence whose steps, pages and slot a test decides.

    Args:
        token_ids: its prompt and, after a preemption, what it had generated.
    """

    def __init__(
        self,
        runner: ModelRunner,
        token_ids: list[int],
        pages: list[int],
        slot: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        self.runner = runner
        self._new = [NewRequestData("r", token_ids, num_prompt_tokens or len(token_ids), GREEDY, pages, slot, 0)]

    def step(self, n: int) -> int | None:
        """Compute n tokens; the one that is sampled after them, if any."""
        output = self.runner.execute(SchedulerOutput({"r": n}, self._new))
        self._new = []
        return output.result().sampled_token_ids.get("r", [None])[0]

    def finish(self) -> None:
        self.runner.execute(SchedulerOutput(finished_request_ids=["r"]))
