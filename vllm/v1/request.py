"""One sequence on its way through the engine: what was asked, what has come out, how far the device has got."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.messages import EngineCoreRequest
    from vllm.v1.structured_output.constraint import Constraint


class RequestStatus(enum.Enum):
    """Where a request stands. A RUNNING one, and no other, has a row on the worker, pages and a state slot."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
}


@dataclass(slots=True, eq=False)
class Request:
    """The scheduler's record of one sequence. Lengths are derived; `num_computed_tokens` is the only count that is kept."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float
    priority: int = 0  # lower goes first

    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose keys, values and state the steps scheduled so far write
    status: RequestStatus = RequestStatus.WAITING
    stop_reason: int | None = None  # the stop token id that ended it; None for end-of-sequence
    queue_number: int = 0  # its place in the order in which the scheduler received requests
    scheduled_time: float | None = None  # when it was first admitted
    has_output: bool = False  # the front end has heard of it at least once
    num_prompt_logprobs_delivered: int = 0
    num_preemptions: int = 0
    constraint: Constraint | None = None  # the form that its text must have, and how far it has come

    @classmethod
    def from_engine_core_request(cls, message: EngineCoreRequest) -> Request:
        """The record for a request that has just come in from the front end."""
        return cls(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling_params=message.sampling_params,
            arrival_time=message.arrival_time,
            priority=message.priority,
        )

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, whether computed or not."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that no step has been given yet: one while decoding, none while a sample is under way.

        Steps may be given tokens that are still being sampled, so that it can be negative.
        """
        return len(self.prompt_token_ids) + len(self.output_token_ids) - self.num_computed_tokens

    @property
    def must_know_tokens(self) -> bool:
        """Whether its next token depends on what the one before it was, beyond what the model makes of it."""
        return self.constraint is not None and self.constraint.must_know_tokens

    @property
    def num_under_way(self) -> int:
        """Samples that scheduled steps will take and whose values are not known yet."""
        return max(0, 1 - self.num_uncomputed_tokens)

    @property
    def all_token_ids(self) -> list[int]:
        """Prompt and output in a list of its own."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def is_finished(self) -> bool:
        return self.status in _FINISH_REASONS

    @property
    def finish_reason(self) -> str | None:
        """The word of the OpenAI API for how it ended: "stop", "length" or "abort"; None before."""
        return _FINISH_REASONS.get(self.status)
