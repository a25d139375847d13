"""What the scheduler decides for one step, and what the worker reports back. Plain data: it may cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRequestData:
    """A sequence that the worker has no row for: new, or resumed after a preemption."""

    request_id: str
    token_ids: list[int]  # prompt, and for a resumed sequence also what it has generated
    num_prompt_tokens: int
    sampling_params: SamplingParams
    block_ids: list[int]  # pages held now
    state_slot: int
    num_computed_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step: who computes how many tokens, and what the worker must forget first."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)  # in row order: the sequences of this step
    new_requests: list[NewRequestData] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)  # pages appended, for sequences with a row
    finished_request_ids: list[str] = field(default_factory=list)  # finished, aborted or preempted since the last step
    step_id: int = field(default=0, compare=False)  # counts up from step to step

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())
