"""One batch of equal requests through an LLMEngine, timed step by step: first tokens, then the steps in which all of them decode."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

MIN_STEPS = 4
"""Fewer steps with every sequence decoding say nothing about a step."""

_ids = itertools.count()


@dataclass(frozen=True)
class DecodeRun:
    """What one batch took.

    Attributes:
        ttft: seconds from the first request's arrival to each request's first token, in the order they came.
        seconds, tokens, steps: of the window from the last first token to the first last one.
        total_seconds: from the first request's arrival to the last token.
    """

    concurrency: int
    ttft: list[float]
    seconds: float
    tokens: int
    steps: int
    total_seconds: float

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second of all sequences together."""
        return self.tokens / self.seconds

    @property
    def tok_s_a_request(self) -> float:
        return self.decode_tok_s / self.concurrency

    @property
    def step_ms(self) -> float:
        return self.seconds / self.steps * 1e3

    @property
    def ttft_ms(self) -> float:
        """Median over the requests."""
        return statistics.median(self.ttft) * 1e3

    def summary(self) -> dict[str, float]:
        return {
            "decode_tok_s": self.decode_tok_s,
            "tok_s_a_request": self.tok_s_a_request,
            "step_ms": self.step_ms,
            "ttft_ms": self.ttft_ms,
        }


def greedy_params(output_len: int) -> SamplingParams:
    """So many tokens, with as little work beside the model's as can be."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """The same prompts for the same arguments; ids of the first 256 are left out, where special tokens may be."""
    draw = random.Random(f"{seed}/{length}")
    low = 256 if vocab_size > 512 else 0
    return [draw.choices(range(low, vocab_size), k=length) for _ in range(count)]


def run_batch(engine: LLMEngine, prompts: Sequence[Sequence[int]], output_len: int) -> DecodeRun:
    """Greedy, `output_len` tokens each, whatever they are. The engine must be idle.

    Progress is read off the engine's counters, so that measuring makes no outputs that nobody reads.

    Raises:
        ValueError: too few steps in which all sequences decode, or sequences gave way to others.
    """
    metrics, num = engine.metrics, len(prompts)
    firsts, tokens = _first_tokens(engine), metrics.generation_tokens
    finished, preemptions = sum(metrics.finished.values()), metrics.num_preemptions
    params = greedy_params(output_len)
    ids: list[str] = []
    ttft: list[float] = []
    window: list[tuple[float, int]] = []  # (time, tokens so far) from the last first token on
    ended = 0
    start = time.perf_counter()
    try:
        for prompt in prompts:
            ids.append(f"bench-{next(_ids)}")
            engine.add_request(ids[-1], {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests:
            engine.step()
            now = time.perf_counter()
            if len(ttft) < num:
                ttft += [now - start] * (_first_tokens(engine) - firsts - len(ttft))
            if len(ttft) == num and ended == 0 and (not window or metrics.generation_tokens - tokens > window[-1][1]):
                window.append((now, metrics.generation_tokens - tokens))
            ended = sum(metrics.finished.values()) - finished
    except BaseException:
        engine.abort_requests(ids)
        raise
    if metrics.num_preemptions > preemptions:
        raise ValueError(f"{num} sequences do not fit at once: some had to give way; lower the concurrency")
    steps = len(window) - 1
    if steps < MIN_STEPS:
        raise ValueError(
            f"output of {output_len} tokens leaves {max(steps, 0)} steps in which all {num} sequences decode, and {MIN_STEPS} are needed: "
            "raise --output-len, or --max-num-batched-tokens so that prompts are done sooner"
        )
    (begin, before), (end, after) = window[0], window[-1]
    return DecodeRun(num, ttft, end - begin, after - before, steps, now - start)


def run_greedy(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], output_len: int, logprobs: int | None = None
) -> list[RequestOutput]:
    """The same batch for what it says rather than how fast: whole outputs, in the order of the prompts."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    ids: list[str] = []
    done: dict[str, RequestOutput] = {}
    try:
        for prompt in prompts:
            ids.append(f"bench-{next(_ids)}")
            engine.add_request(ids[-1], {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests:
            done |= {output.request_id: output for output in engine.step() if output.finished}
    except BaseException:
        engine.abort_requests(ids)
        raise
    return [done[i] for i in ids]


def check_concurrency(engine: LLMEngine, concurrencies: Iterable[int], tokens: int) -> None:
    """Raise ValueError unless the engine's pools hold the largest number of sequences of `tokens` tokens at once."""
    asked, info = max(concurrencies), engine.core.info
    pages = -(-tokens // info.block_size)
    limits = {
        "state slots": info.num_slots - 1,
        "attention pages": (info.num_blocks - 1) // pages,  # block 0 is nobody's
        "--max-num-seqs": engine.config.scheduler_config.max_num_seqs,
        "--max-num-batched-tokens": engine.config.scheduler_config.max_num_batched_tokens,
    }
    what = min(limits, key=limits.__getitem__)
    if asked > limits[what]:
        raise ValueError(
            f"a concurrency of {asked} with {tokens} tokens each does not fit: {what} allow {limits[what]}; lower the concurrency or the "
            "lengths, or give the pools more (--gpu-memory-utilization, on a CPU --kv-cache-memory-bytes)"
        )


def _first_tokens(engine: LLMEngine) -> int:
    return sum(engine.metrics.time_to_first_token.counts)
