"""Steps over prompts that nobody sent: to measure what the largest need, and to have every kernel compiled before the first request."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.compile_ahead import compile_ahead
from vllm.v1.worker.model_runner import ModelRunner

_LENGTHS = (1, 2, 5, 9, 16, 17, 33, 65, 128, 130, 257, 512, 1000)
"""Prompts of these lengths take every path that kernels choose by size: few rows, tiles of each height, multiples of 16 or not."""

_DRAWS = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=0, max_tokens=2)
_GREEDY = SamplingParams(temperature=0.0, max_tokens=2)


def run_largest_steps(runner: ModelRunner) -> None:
    """The steps that need most memory: as many tokens of prompts as a step may have, in the fewest chunks, have the largest workspace of a
    layer, and as many sequences as may run have the most logits to sample from.
    """
    limits, longest = runner.config.scheduler_config, runner.config.longest_chunk
    whole, rest = divmod(limits.max_num_batched_tokens, longest)
    _run_prompts(runner, ([longest] * whole + [rest] * (rest > 0))[: limits.max_num_seqs], _DRAWS)
    _run_prompts(runner, [1] * min(limits.max_num_seqs, limits.max_num_batched_tokens), _DRAWS)


def compile_kernels(runner: ModelRunner) -> None:
    """Run prompts of many lengths, alone, together and beside a decoding sequence."""
    longest, many = runner.config.longest_chunk, runner.config.scheduler_config.max_num_seqs
    _run_each_length(runner)
    if many > 1 and longest >= 8:
        _run_prompts(runner, [3, longest // 2], _DRAWS, then_decode_first=True)


def compile_in_children(runner: ModelRunner) -> None:
    """Compile what those steps and the graphs launch, many kernels at once. No step takes its tokens from one that has not really run."""

    def rest() -> None:
        runner.rehearse_graphs()
        run_largest_steps(runner)
        _run_each_length(runner)

    compile_ahead(lambda: runner.rehearse_graphs(largest_alone=True), rest)


def _run_each_length(runner: ModelRunner) -> None:
    longest = runner.config.longest_chunk
    for n in (*(n for n in _LENGTHS if n < longest), longest):
        _run_prompts(runner, [n], _GREEDY)


def _run_prompts(
    runner: ModelRunner, lengths: Sequence[int], params: SamplingParams, then_decode_first: bool = False
) -> None:
    """Compute prompts of these lengths in one step; on request, the first one's next token beside the last prompt in another.

    They all write to slot 1 and to the same pages from 1 on: the numbers are thrown away, and who gets those places writes before reading.
    """
    vocab_size = runner.config.model_config.hf_config.text.vocab_size
    page = runner.config.cache_config.block_size

    def request(i: int, n: int) -> NewRequestData:
        pages = list(range(1, 1 + min(n // page + 1, runner.batch.block_table.shape[1])))
        return NewRequestData(f"warm-up-{i}", [j % vocab_size for j in range(n)], n, params, pages, 1, 0)

    requests = [request(i, n) for i, n in enumerate(lengths)]
    steps = [requests[:1], requests[1:]] if then_decode_first else [requests]
    running: dict[str, int] = {}
    for new in steps:
        scheduled = running | {r.request_id: r.num_prompt_tokens for r in new}
        runner.execute(SchedulerOutput(scheduled, new))
        running = dict.fromkeys(scheduled, 1)
    runner.execute(SchedulerOutput(finished_request_ids=list(running)))
