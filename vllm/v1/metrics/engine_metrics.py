"""The numbers of one engine: recorded by the front end, a few hundred nanoseconds each, and read at any time.

Everything is recorded where outputs arrive, once: a token that is computed again after a preemption, or that belongs to a
request aborted meanwhile, never gets there. Requests are those of callers: one with n sequences counts once, its prompt too.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from typing import TYPE_CHECKING

from vllm.v1.metrics.reader import Counter, Gauge, Histogram, Metric

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestMetrics
    from vllm.v1.engine.messages import EngineCoreInfo, SchedulerStats

FINISH_REASONS = ("stop", "length", "abort")


class Distribution:
    """Observations counted by size.

    Args:
        bounds: rising; an observation belongs to the first that is not below it.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def read(self, name: str, labels: dict[str, str], help: str) -> Histogram:
        buckets, count = {}, 0
        for bound, n in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            count += n
            buckets[bound] = count
        return Histogram(name, labels, help, count, self.sum, buckets)


def steps(low: float, high: float, factors: tuple[float, ...]) -> list[float]:
    """low times 1 and each of the factors, then ten times that, and so on up to high."""
    bounds, decade = [], low
    while decade <= high * (1 + 1e-9):
        bounds += [round(decade * factor, 9) for factor in (1, *factors) if decade * factor <= high * (1 + 1e-9)]
        decade *= 10
    return bounds


def _seconds() -> Distribution:
    return Distribution(steps(0.001, 2500, (2.5, 5)))


class EngineMetrics:
    """Counts and times of one engine since its start.

    Args:
        config: of the engine; names the model and bounds the buckets.
        engine: the value of the label `engine`, which tells several engines behind one server apart.
    """

    def __init__(self, config: VllmConfig, engine: str = "0") -> None:
        self.labels = {"model_name": config.model_config.served_model_name, "engine": engine}
        self._cache_config = dataclasses.asdict(config.cache_config)
        self._info: EngineCoreInfo | None = None
        self._registry = None
        self.num_running = self.num_waiting = 0
        self.kv_cache_usage = 0.0
        self.num_preemptions = self.prefix_cache_queries = self.prefix_cache_hits = 0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.num_accepted_tokens_per_pos = [0]
        self.prompt_tokens = self.generation_tokens = 0
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        longest = config.model_config.max_model_len
        self.step_tokens = Distribution(
            [float(1 << i) for i in range(config.scheduler_config.max_num_batched_tokens.bit_length() + 1)]
        )
        self.request_prompt_tokens = Distribution(steps(1, longest, (2, 5)))
        self.request_generation_tokens = Distribution(steps(1, longest, (2, 5)))
        self.time_to_first_token = _seconds()
        self.inter_token_latency = _seconds()
        self.time_per_output_token = _seconds()
        self.e2e_latency = _seconds()
        self.queue_time = _seconds()
        self.prefill_time = _seconds()
        self.decode_time = _seconds()
        self.inference_time = _seconds()

    # Recording.

    def engine_is_ready(self, info: EngineCoreInfo) -> None:
        """The sizes that the engine core has settled on."""
        self._info = info

    def step(self, stats: SchedulerStats, num_unfinished: int) -> None:
        """What the core says after a step.

        Args:
            num_unfinished: sequences that the front end waits for, also those that the core has not seen yet. All that do
                not run wait.
        """
        self.num_running = min(stats.num_running, num_unfinished)
        self.num_waiting = num_unfinished - self.num_running
        self.kv_cache_usage = stats.kv_cache_usage
        self.num_preemptions = stats.num_preemptions
        self.prefix_cache_queries = stats.prefix_cache_queries
        self.prefix_cache_hits = stats.prefix_cache_hits
        self.num_drafts = stats.num_drafts
        self.num_draft_tokens = stats.num_draft_tokens
        self.num_accepted_tokens = stats.num_accepted_tokens
        self.num_accepted_tokens_per_pos = stats.num_accepted_tokens_per_pos or [0]
        if stats.num_step_tokens:
            self.step_tokens.observe(stats.num_step_tokens)

    def queue_length(self, num_unfinished: int) -> None:
        """Requests came or were dropped between two steps."""
        self.num_running = min(self.num_running, num_unfinished)
        self.num_waiting = num_unfinished - self.num_running

    def first_token(self, num_prompt_tokens: int, seconds: float) -> None:
        """A request's first token came; its prompt has therefore been computed."""
        self.prompt_tokens += num_prompt_tokens
        self.time_to_first_token.observe(max(seconds, 0.0))

    def request_finished(
        self,
        reason: str,
        times: RequestMetrics,
        last_token_time: float | None,
        num_prompt_tokens: int,
        num_tokens: list[int],
    ) -> None:
        """A request ended. Times are taken of those that ran to their end: where an aborted one stood says nothing.

        Args:
            num_tokens: generated, for each of its sequences.
        """
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.request_prompt_tokens.observe(num_prompt_tokens)
        self.request_generation_tokens.observe(sum(num_tokens))
        start, first, last = times.first_scheduled_time, times.first_token_time, last_token_time
        if reason == "abort" or times.finished_time is None:
            return
        self.e2e_latency.observe(max(times.finished_time - times.arrival_time, 0.0))
        if start is None or first is None or last is None:
            return
        self.queue_time.observe(max(start - times.arrival_time, 0.0))
        self.prefill_time.observe(max(first - start, 0.0))
        self.decode_time.observe(last - first)
        self.inference_time.observe(max(last - start, 0.0))
        if (longest := max(num_tokens)) > 1:
            self.time_per_output_token.observe((last - first) / (longest - 1))

    # Reading.

    def snapshot(self) -> list[Metric]:
        """Every metric, as plain values."""
        labels = self.labels
        gauges = [
            ("num_requests_running", self.num_running, "Sequences that run."),
            ("num_requests_waiting", self.num_waiting, "Sequences that wait to run, preempted ones among them."),
            ("kv_cache_usage_perc", self.kv_cache_usage, "Share of the attention pages in use; 1 is all."),
        ]
        counters = [
            ("prompt_tokens", self.prompt_tokens, "Prompt tokens computed, each prompt once."),
            ("generation_tokens", self.generation_tokens, "Tokens generated."),
            ("num_preemptions", self.num_preemptions, "Times a sequence gave its pages up, to be computed again."),
            ("prefix_cache_queries", self.prefix_cache_queries, "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", self.prefix_cache_hits, "Prompt tokens found in the prefix cache."),
            ("spec_decode_num_drafts", self.num_drafts, "Times that draft tokens of a sequence were checked."),
            ("spec_decode_num_draft_tokens", self.num_draft_tokens, "Draft tokens checked."),
            ("spec_decode_num_accepted_tokens", self.num_accepted_tokens, "Draft tokens that were right."),
        ]
        distributions = [
            ("iteration_tokens_total", self.step_tokens, "Tokens computed by a step."),
            ("time_to_first_token_seconds", self.time_to_first_token, "From arrival to the first token."),
            ("inter_token_latency_seconds", self.inter_token_latency, "From one output of a sequence to the next."),
            ("request_time_per_output_token_seconds", self.time_per_output_token, "A request's mean time a token."),
            ("e2e_request_latency_seconds", self.e2e_latency, "From arrival to the end."),
            ("request_queue_time_seconds", self.queue_time, "From arrival to the first step."),
            ("request_prefill_time_seconds", self.prefill_time, "From the first step to the first token."),
            ("request_decode_time_seconds", self.decode_time, "From the first token to the last."),
            ("request_inference_time_seconds", self.inference_time, "From the first step to the last token."),
            ("request_prompt_tokens", self.request_prompt_tokens, "Prompt tokens of a request."),
            ("request_generation_tokens", self.request_generation_tokens, "Tokens generated for a request."),
        ]
        metrics: list[Metric] = [Gauge(f"vllm:{name}", labels, help, value) for name, value, help in gauges]
        metrics += [Counter(f"vllm:{name}", labels, help, value) for name, value, help in counters]
        for position, count in enumerate(self.num_accepted_tokens_per_pos):
            place = labels | {"position": str(position)}
            help = "Draft tokens that were right, by their place in the draft."
            metrics.append(Counter("vllm:spec_decode_num_accepted_tokens_per_pos", place, help, count))
        for reason, count in self.finished.items():
            ended = labels | {"finished_reason": reason}
            metrics.append(Counter("vllm:request_success", ended, "Requests that ended, by how.", count))
        metrics += [distribution.read(f"vllm:{name}", labels, help) for name, distribution, help in distributions]
        metrics.append(Gauge("vllm:cache_config_info", labels | self._sizes(), "Sizes of the pools.", 1))
        return metrics

    @property
    def registry(self):
        """A prometheus_client registry of this engine's own, to which a server may add its metrics."""
        if self._registry is None:
            from vllm.v1.metrics.prometheus import make_registry  # here: only servers have that library loaded

            self._registry = make_registry(self)
        return self._registry

    def render(self) -> bytes:
        """The registry as Prometheus text."""
        from vllm.v1.metrics.prometheus import generate_latest

        return generate_latest(self.registry)

    @property
    def content_type(self) -> str:
        """What `render` gives, as HTTP calls it."""
        from vllm.v1.metrics.prometheus import CONTENT_TYPE_LATEST

        return CONTENT_TYPE_LATEST

    def _sizes(self) -> dict[str, str]:
        sizes = dict(self._cache_config)
        if self._info is not None:
            sizes |= {"num_gpu_blocks": self._info.num_blocks, "num_state_slots": self._info.num_slots}
        return {name: str(value) for name, value in sizes.items()}
