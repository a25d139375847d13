"""What the front end and the engine core say to each other. Plain data: it may cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import TokenLogprobs


@dataclass(slots=True)
class EngineCoreRequest:
    """A validated, tokenised request for one sequence (n > 1 becomes n of them)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float  # seconds, time.time()
    priority: int = 0  # lower goes first


@dataclass(slots=True)
class EngineCoreOutput:
    """What one step added to one sequence."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = (
        None  # the stop token id, where one ended it; of an abort, why; None for end-of-sequence
    )
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)
    new_prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    scheduled_time: float | None = None  # seconds, time.time(), set on the first output of the sequence


@dataclass(slots=True)
class SchedulerStats:
    """Where the scheduler stands after a step. Counts run from the engine's start unless they say otherwise."""

    num_running: int = 0
    num_waiting: int = 0  # preempted ones among them
    kv_cache_usage: float = 0.0  # share of the pages in use, 0 to 1
    num_preemptions: int = 0
    num_step_tokens: int = 0  # computed by this step, prompts and decoding together
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0
    num_drafts: int = 0  # steps of sequences that had draft tokens to check
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)  # first draft token, second, ...


@dataclass(slots=True)
class EngineCoreOutputs:
    """One step of the engine core, in one message."""

    outputs: list[EngineCoreOutput]
    stats: SchedulerStats
    answers: list[CallAnswer] = field(default_factory=list)


@dataclass(slots=True)
class CallAnswer:
    """What a call returned, or in one line what went wrong."""

    call_id: int
    result: Any = None
    error: str | None = None


@dataclass(slots=True)
class EngineCoreInfo:
    """What the front end learns of an engine core that is ready."""

    num_blocks: int  # pages, the padding page among them
    block_size: int
    num_slots: int  # state slots, the padding slot among them

    @property
    def num_token_places(self) -> int:
        """Tokens that the pages hold when one sequence has them all."""
        return (self.num_blocks - 1) * self.block_size

    def check_fits(self, num_prompt_tokens: int) -> None:
        """Raise ValueError when a prompt of this length could never be run, however idle the engine."""
        if num_prompt_tokens > self.num_token_places:
            raise ValueError(
                f"prompt has {num_prompt_tokens} tokens; the attention pages hold {self.num_token_places} in all"
            )


@dataclass(slots=True)
class AddRequests:
    """To the core: queue these sequences."""

    requests: list[EngineCoreRequest]


@dataclass(slots=True)
class AbortRequests:
    """To the core: drop these sequences wherever they are; unknown ones are ignored."""

    request_ids: list[str]


@dataclass(slots=True)
class CallCore:
    """To the core: call one of its methods between two steps."""

    call_id: int
    method: str  # one of CORE_METHODS


CORE_METHODS = ("reset_prefix_cache", "start_profile", "stop_profile")

Command = AddRequests | AbortRequests | CallCore
