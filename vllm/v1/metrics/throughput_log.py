"""One line in the log every few seconds while an engine is busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.metrics.engine_metrics import EngineMetrics

logger = init_logger(__name__)


class ThroughputLog:
    """Looks at the clock with every step; needs no timer, and is silent while there are no steps.

    Args:
        interval: seconds from line to line.
        clock: seconds, never going back.
    """

    def __init__(
        self, metrics: EngineMetrics, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._interval = interval
        self._clock = clock
        self._last_step = float("-inf")
        self._start = 0.0
        self._tokens = (0, 0)

    def step(self) -> None:
        """A step's outputs have been recorded."""
        now, metrics = self._clock(), self._metrics
        if now - self._last_step > self._interval:  # the engine was idle: that time is nobody's
            self._start, self._tokens = now, (metrics.prompt_tokens, metrics.generation_tokens)
        self._last_step = now
        seconds = now - self._start
        if seconds < self._interval:
            return
        logger.info(
            "Throughput: prompts %.1f tokens/s, generation %.1f tokens/s; %d running, %d waiting; KV pages %.1f %% used",
            (metrics.prompt_tokens - self._tokens[0]) / seconds,
            (metrics.generation_tokens - self._tokens[1]) / seconds,
            metrics.num_running,
            metrics.num_waiting,
            100 * metrics.kv_cache_usage,
        )
        self._start, self._tokens = now, (metrics.prompt_tokens, metrics.generation_tokens)
