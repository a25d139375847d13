"""How many sequences and tokens one step may hold, and who goes first."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import check_at_least, check_choices, knob


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, and of the queue before it."""

    max_num_seqs: int = knob(256, "Most sequences that run at once; each holds one GDN state slot.")
    max_num_batched_tokens: int = knob(2048, "Most tokens computed in one step.")
    enable_chunked_prefill: bool = knob(True, "Cut long prompts into chunks that share steps with decoding sequences.")
    scheduling_policy: str = knob(
        "fcfs", "fcfs: first come, first served; priority: lowest number first.", choices=("fcfs", "priority")
    )
    async_scheduling: bool | None = knob(
        None, "Schedule a step while the one before it is computed; default: on a GPU."
    )
    max_num_queued_requests: int = knob(
        4096, "Most sequences that a server lets wait beside those that run; beyond that it answers 503."
    )
    stream_interval: int = knob(
        1, "Tokens of a stream that are sent together, after the first; more of them cost less and come less smoothly."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, max_num_seqs=1, max_num_queued_requests=0, stream_interval=1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs one token a step, so raise the first or lower the second"
            )
