"""An engine's metrics for Prometheus, collected when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family

from vllm.v1.metrics.reader import Counter, Gauge, Histogram, Metric

if TYPE_CHECKING:
    from vllm.v1.metrics.engine_metrics import EngineMetrics

__all__ = ["CONTENT_TYPE_LATEST", "generate_latest", "make_registry"]

_FAMILIES = {Counter: CounterMetricFamily, Gauge: GaugeMetricFamily, Histogram: HistogramMetricFamily}


class _Collector:
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        for metric in self._metrics.snapshot():
            if metric.name not in families:
                make = _FAMILIES[type(metric)]
                families[metric.name] = make(metric.name, metric.help, labels=list(metric.labels))
            _add(families[metric.name], metric)
        yield from families.values()

    def describe(self) -> list[Family]:
        return list(self.collect())


def make_registry(metrics: EngineMetrics) -> CollectorRegistry:
    """A registry with nothing but one engine's metrics in it."""
    registry = CollectorRegistry()
    registry.register(_Collector(metrics))
    return registry


def _add(family: Family, metric: Metric) -> None:
    values = list(metric.labels.values())
    if isinstance(metric, Histogram):
        family.add_metric(values, buckets=list(metric.buckets.items()), sum_value=metric.sum)
    else:
        family.add_metric(values, metric.value)
