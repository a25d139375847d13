"""Medians, percentiles, and how sure a ratio of two speeds is. Standard library only.

Rounds are paired: round i of B stands beside round i of A, run moments before, so that what slows the machine for a while slows both. The
statistic is the median of the rounds' ratios, which one disturbed round does not move.

With few rounds a plain percentile bootstrap is too sure of itself: resampling n values gives a spread that is smaller by sqrt((n - 1) / n), and
its quantiles are those of the normal distribution where Student's belong. Both are put right by taking wider quantiles, the expanded
percentile interval of Hesterberg, "What teachers should know about the bootstrap", arXiv 1411.5279, section 5.3. Still, n fair coins fall on one
side once in 2^(n - 1) times, so that no verdict of that confidence can come of fewer rounds than `rounds_needed`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RESAMPLES = 4000
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference shown"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast B is as A, and between which bounds that ratio lies."""

    value: float
    low: float
    high: float
    verdict: str


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def rounds_needed(confidence: float) -> int:
    """Paired rounds below which a verdict would be chance too often: 8 for 0.99, 6 for 0.95."""
    return math.ceil(1 - math.log2(1 - confidence))


def compare_rounds(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.99, min_effect: float = 0.01, seed: int = 0
) -> Ratio:
    """Speeds of the same rounds of A and of B, higher is better -> B's over A's.

    The verdict is "faster" or "slower" only where the interval excludes 1 and the ratio is at least `min_effect` away from it.

    Raises:
        ValueError: the two have different numbers of rounds, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired rounds are needed; got {len(a)} and {len(b)}")
    logs = [math.log(y / x) for x, y in zip(a, b)]
    value = math.exp(statistics.median(logs))
    if len(logs) < rounds_needed(confidence):
        return Ratio(value, 0.0, math.inf, NO_DIFFERENCE)
    low, high = bootstrap_interval(logs, statistics.median, confidence, seed)
    return _judge(value, math.exp(low), math.exp(high), min_effect)


def compare_groups(
    old: Sequence[float], new: Sequence[float], *, confidence: float = 0.99, min_effect: float = 0.01, seed: int = 0
) -> Ratio:
    """Unpaired runs: the ratio of the medians, new over old, each side resampled by itself.

    With so few runs that chance alone sorts them by side too often, the bounds are 0 and infinity.
    """
    value = statistics.median(new) / statistics.median(old)
    if min(len(old), len(new)) < 2 or 2 / math.comb(len(old) + len(new), len(old)) > 1 - confidence:
        return Ratio(value, 0.0, math.inf, NO_DIFFERENCE)
    draw = random.Random(seed)
    tail = _tail(min(len(old), len(new)), confidence)
    ratios = [
        statistics.median(draw.choices(new, k=len(new))) / statistics.median(draw.choices(old, k=len(old)))
        for _ in range(RESAMPLES)
    ]
    return _judge(value, percentile(ratios, 100 * tail), percentile(ratios, 100 * (1 - tail)), min_effect)


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float], confidence: float = 0.99, seed: int = 0
) -> tuple[float, float]:
    """Bounds of a statistic of the values' population. One value says nothing of its spread: the bounds are infinite."""
    if len(values) < 2:
        return -math.inf, math.inf
    draw = random.Random(seed)
    found = [statistic(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    tail = _tail(len(values), confidence)
    return percentile(found, 100 * tail), percentile(found, 100 * (1 - tail))


def median_with_bounds(values: Sequence[float], confidence: float = 0.99) -> dict[str, float | None]:
    """{"median", "low", "high"}; bounds that nothing is known of are None."""
    low, high = bootstrap_interval(values, statistics.median, confidence)
    known = math.isfinite(low)
    return {"median": statistics.median(values), "low": low if known else None, "high": high if known else None}


def _judge(value: float, low: float, high: float, min_effect: float) -> Ratio:
    verdict = NO_DIFFERENCE
    if low > 1 and value >= 1 + min_effect:
        verdict = FASTER
    elif high < 1 and value <= 1 / (1 + min_effect):
        verdict = SLOWER
    return Ratio(value, low, high, verdict)


def _tail(n: int, confidence: float) -> float:
    """The quantile to take on each side: Phi(-sqrt(n / (n - 1)) t), t being Student's for n - 1 degrees of freedom."""
    t = _student_quantile(0.5 + confidence / 2, n - 1)
    return statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)


def _student_quantile(p: float, degrees: int) -> float:
    """Where Student's distribution function reaches p > 0.5, by bisection of its integral."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cos, term, total = math.cos(theta), 1.0, 0.0
    if degrees % 2:
        if degrees > 1:
            term = total = cos
            for i in range(3, degrees - 1, 2):
                term *= cos * cos * (i - 1) / i
                total += term
        return 0.5 + (theta + math.sin(theta) * total) / math.pi
    total = term
    for i in range(2, degrees - 1, 2):
        term *= cos * cos * (i - 1) / i
        total += term
    return 0.5 + math.sin(theta) * total / 2
