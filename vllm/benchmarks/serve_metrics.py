"""From the moments at which a server's tokens arrived to the numbers that people compare."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.benchmarks.stats import percentile

WIDTH = 50
TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(slots=True)
class Record:
    """One request. Times are time.perf_counter()'s; a request that failed has `error`."""

    prompt_len: int
    expected_len: int
    start: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each event that brought tokens
    output_len: int = 0
    text: list[str] = field(default_factory=list)
    counted: bool = False  # output_len is the server's own count rather than that of events
    error: str | None = None

    @property
    def success(self) -> bool:
        return self.error is None and bool(self.arrivals)

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.start

    @property
    def e2el(self) -> float:
        """To the last token: what a server sends after it (usage, [DONE]) keeps nobody waiting."""
        return self.arrivals[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first; None where there is none."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def itls(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:])]


def summarise(
    records: Sequence[Record],
    duration: float,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """The keys of the result file, which are those of vLLM's.

    Args:
        duration: seconds from the first request to the last token.
        metrics: of TITLES.
        percentiles: such as 99.
        goodput: metric -> most milliseconds; empty: none.
    """
    good = [record for record in records if record.success]
    tokens_in, tokens_out = sum(r.prompt_len for r in good), sum(r.output_len for r in good)
    tpots = [tpot for record in good if (tpot := record.tpot) is not None]
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_is_good(record, goodput) for record in good) / duration if goodput else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": peak_tokens(good),
        "max_concurrent_requests": peak_concurrency(good),
    }
    values = {
        "ttft": [record.ttft for record in good],
        "tpot": tpots,
        "itl": [gap for record in good for gap in record.itls],
        "e2el": [record.e2el for record in good],
    }
    for name in metrics:
        ms = [1e3 * value for value in values[name]] or [0.0]
        found[f"mean_{name}_ms"] = statistics.fmean(ms)
        found[f"median_{name}_ms"] = statistics.median(ms)
        found[f"std_{name}_ms"] = statistics.pstdev(ms)
        for p in percentiles:
            found[f"p{p:g}_{name}_ms"] = percentile(ms, p)
    return found


def _is_good(record: Record, limits: dict[str, float]) -> bool:
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(1e3 * values[name] <= most for name, most in limits.items())


def peak_tokens(records: Sequence[Record]) -> float:
    """Tokens a second in the best of the whole seconds from the first request on; a run of less than a second is one of them."""
    if not records:
        return 0.0
    start, end = min(record.start for record in records), max(record.arrivals[-1] for record in records)
    length = min(end - start, 1.0)
    seconds: dict[int, float] = {}
    for record in records:
        each = record.output_len / len(record.arrivals)  # an event may bring several tokens
        for moment in record.arrivals:
            second = int(moment - start)
            seconds[second] = seconds.get(second, 0.0) + each
    return max(seconds.values()) / length


def peak_concurrency(records: Sequence[Record]) -> int:
    """The most requests that were under way at one moment."""
    changes = sorted([(r.start, 1) for r in records] + [(r.arrivals[-1], -1) for r in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def block(
    found: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float], rate: float, concurrency: int | None
) -> str:
    """What the terminal shows, 50 columns wide."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    row = lambda name, value: lines.append(f"{name:<40} {value:<10}")
    row("Successful requests:", found["completed"])
    row("Failed requests:", found["failed"])
    if concurrency is not None:
        row("Maximum request concurrency:", concurrency)
    if rate != float("inf"):
        row("Request rate configured (RPS):", f"{rate:.2f}")
    row("Benchmark duration (s):", f"{found['duration']:.2f}")
    row("Total input tokens:", found["total_input_tokens"])
    row("Total generated tokens:", found["total_output_tokens"])
    row("Request throughput (req/s):", f"{found['request_throughput']:.2f}")
    if found["request_goodput"] is not None:
        row("Request goodput (req/s):", f"{found['request_goodput']:.2f}")
    row("Output token throughput (tok/s):", f"{found['output_throughput']:.2f}")
    row("Peak output token throughput (tok/s):", f"{found['max_output_tokens_per_s']:.2f}")
    row("Peak concurrent requests:", f"{found['max_concurrent_requests']:.2f}")
    row("Total token throughput (tok/s):", f"{found['total_token_throughput']:.2f}")
    for name in metrics:
        title, short = TITLES[name]
        lines.append(f"{title:-^{WIDTH}}")
        row(f"Mean {short} (ms):", f"{found[f'mean_{name}_ms']:.2f}")
        row(f"Median {short} (ms):", f"{found[f'median_{name}_ms']:.2f}")
        for p in percentiles:
            row(f"P{p:g} {short} (ms):", f"{found[f'p{p:g}_{name}_ms']:.2f}")
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def details(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One entry a request, in the order of sending."""
    start = min((record.start for record in records if record.start), default=0.0)
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len for record in records],
        "start_times": [record.start - start if record.start else None for record in records],
        "ttfts": [record.ttft if record.success else None for record in records],
        "itls": [record.itls for record in records],
        "e2els": [record.e2el if record.success else None for record in records],
        "generated_texts": ["".join(record.text) for record in records],
        "errors": [record.error or "" for record in records],
    }
