"""What the engine tells about itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import knob


@dataclass(frozen=True)
class ObservabilityConfig:
    """Statistics. The server's /metrics route is there whatever is set here."""

    disable_log_stats: bool = knob(
        False, "Do not log a line about throughput every ten seconds while a server is busy."
    )
