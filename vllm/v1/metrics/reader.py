"""Metrics as plain values, read without any library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One time series at one moment. The name is as Prometheus shows it, less the `_total` of counters."""

    name: str
    labels: dict[str, str]
    help: str


@dataclass(frozen=True)
class Counter(Metric):
    """A number that only grows."""

    value: float


@dataclass(frozen=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass(frozen=True)
class Histogram(Metric):
    """How many observations were at most as large as each bound; the last bound is "+Inf"."""

    count: int
    sum: float
    buckets: dict[str, int]
