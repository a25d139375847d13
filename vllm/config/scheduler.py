"""How many sequences and tokens one step may hold, and who goes first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm.config.knob import check_at_least, check_choices, knob

PERFORMANCE_MODES = {
    "balanced": {"max_num_batched_tokens": 4096, "stream_interval": 1},
    "interactivity": {"max_num_batched_tokens": 512, "stream_interval": 1},
    "throughput": {"max_num_batched_tokens": 8192, "stream_interval": 4},
}
"""--performance-mode -> what it sets where the flag itself does not."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, and of the queue before it. None is resolved by `resolve`, and never seen inside a VllmConfig."""

    max_num_seqs: int = knob(256, "Most sequences that run at once; each holds one GDN state slot.")
    performance_mode: str = knob(
        "balanced",
        "interactivity: prompts hold decoding sequences up for no more than 512 tokens a step; throughput: up to 8192, and streams get "
        "their tokens in fours. Flags that say otherwise win.",
        choices=tuple(PERFORMANCE_MODES),
    )
    max_num_batched_tokens: int | None = knob(
        None, "Most tokens computed in one step; default: 4096, or what --performance-mode says."
    )
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
    stream_interval: int | None = knob(
        None,
        "Tokens of a stream that are sent together, after the first; more of them cost less and come less smoothly. Default: 1, or what "
        "--performance-mode says.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, max_num_seqs=1, max_num_queued_requests=0, stream_interval=1)
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs one token a step, so raise the first or lower the second"
            )

    def resolve(self, device: str) -> SchedulerConfig:
        """What was left open, by the mode and the device ("cuda" or "cpu")."""
        mode = PERFORMANCE_MODES[self.performance_mode]
        tokens, interval = self.max_num_batched_tokens, self.stream_interval
        return replace(
            self,
            max_num_batched_tokens=max(self.max_num_seqs, mode["max_num_batched_tokens"]) if tokens is None else tokens,
            stream_interval=mode["stream_interval"] if interval is None else interval,
            async_scheduling=device == "cuda" if self.async_scheduling is None else self.async_scheduling,
        )
