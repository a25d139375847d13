"""What a caller gets back. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds as time.time() counts them; None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n sequences.

    `logprobs` has one dictionary a token of `token_ids`: token id -> Logprob, the chosen token first. `finish_reason` is "stop",
    "length" or "abort"; `stop_reason` the stop token's id or the stop string, None where end-of-sequence stopped it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's results: all so far, or only what is new, as its `output_kind` says.

    `prompt_logprobs` has one entry a prompt token, None for the first, which nothing comes before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
