"""The metrics of all workers, added up. What is counted never shrinks, whichever worker ends."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from deconvd_server.metrics.reader_collector import ReaderCollector
from deconvd_server.supervision.metrics_channel import Family, MetricsChannel
from deconvd_server.supervision.worker import Worker
from deconvd_server.transports.grpc.health import Health

__all__ = ["MergedMetrics", "supervisor_metrics"]

_ANSWER_S: Final = 2.0
"""How long all workers together may take. Prometheus waits for ten seconds by default."""

_MOST_VIEWS_COUNT: Final = 64
"""For how many readers what ended workers have counted is kept. Each scrapes for itself."""

_COUNTED: Final = frozenset({"counter", "histogram"})
"""The types of metrics that never shrink."""

_LARGEST: Final = frozenset(
    {
        "deconvd_device_info",
        "deconvd_device_wait_seconds",
        "deconvd_queue_wait_seconds",
        "python_info",
        "deconvd",
    }
)
"""Metrics of which the largest value counts: a device, a version or a wait is not more because two workers tell it."""

_SMALLEST: Final = frozenset({"process_start_time_seconds"})

_OWN: Final = frozenset({"deconvd_ready"})
"""Metrics that the supervisor has itself."""

_Key: TypeAlias = tuple[str, frozenset[tuple[str, str]]]
"""The name and the labels of a sample."""


def supervisor_metrics(health: Health, workers: Sequence[Worker]) -> Iterator[Metric]:
    """Yield what the supervisor knows itself."""
    yield GaugeMetricFamily(
        "deconvd_ready", "Whether health is SERVING: 1 or 0.", int(health.is_serving)
    )
    yield GaugeMetricFamily("deconvd_workers", "Processes that should serve as one.", len(workers))
    yield GaugeMetricFamily(
        "deconvd_workers_serving",
        "Processes that serve now.",
        sum(worker.is_serving for worker in workers),
    )
    yield CounterMetricFamily(
        "deconvd_worker_restarts",
        "Processes that were started in place of others.",
        sum(max(worker.restarts_count, 0) for worker in workers),
    )


class MergedMetrics:
    """Metrics of workers, by reader. Called by one thread at a time.

    Args:
        channels: Returns how each worker that runs is asked. A new process has another channel.
        own: Returns the metrics of the supervisor.
        readers: The identities that see all.
    """

    def __init__(
        self,
        channels: Callable[[], Sequence[MetricsChannel]],
        own: Callable[[], Iterable[Metric]],
        readers: Collection[str],
    ) -> None:
        self._channels = channels
        self._own = own
        self._readers = frozenset(readers)
        self._views: OrderedDict[str, _View] = OrderedDict()

    def collector_for(self, identity: str) -> Collector:
        """Return the metrics that a reader may see, by the name that it has proved, which may be empty."""
        return ReaderCollector(self.collect, identity, self._readers)

    def collect(self, identity: str) -> Iterator[Metric]:
        """Yield the metrics of an identity's calls and of the server, or all if it is empty."""
        view = self._views.setdefault(identity, _View())
        self._views.move_to_end(identity)
        if len(self._views) > _MOST_VIEWS_COUNT:
            self._views.popitem(last=False)
        channels = self._channels()
        for channel in channels:
            channel.ask(identity)
        deadline_s = time.monotonic() + _ANSWER_S
        view.update({channel: channel.answer(deadline_s) for channel in channels})
        yield from self._own()
        yield from view.merge()


class _View:
    """What one reader has been told: the last answer of each worker, and what those counted that have ended."""

    def __init__(self) -> None:
        self._last: dict[MetricsChannel, list[Family]] = {}
        self._ended: dict[str, Metric] = {}

    def update(self, answers: dict[MetricsChannel, list[Family] | None]) -> None:
        """Note what workers answer. For one that does not answer in time, what it last answered still counts."""
        for channel, families in answers.items():
            if families is not None:
                self._last[channel] = families
        for channel in [channel for channel in self._last if channel not in answers]:
            counted = (family for family in self._last.pop(channel) if family[2] in _COUNTED)
            self._ended = {
                metric.name: metric for metric in _merge([*_as_families(self._ended), *counted])
            }

    def merge(self) -> Iterator[Metric]:
        """Yield all metrics, added up."""
        yield from _merge(
            [
                *(family for families in self._last.values() for family in families),
                *_as_families(self._ended),
            ]
        )


def _as_families(metrics: dict[str, Metric]) -> Iterator[Family]:
    for metric in metrics.values():
        samples = [(sample.name, sample.labels, sample.value) for sample in metric.samples]
        yield metric.name, metric.documentation, metric.type, samples


def _merge(families: Iterable[Family]) -> Iterator[Metric]:
    """Yield one metric of each name."""
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for name, documentation, kind, samples in families:
        if name in _OWN:
            continue
        metrics.setdefault(name, Metric(name, documentation, kind))
        by_key = values.setdefault(name, {})
        for sample_name, labels, value in samples:
            key = sample_name, frozenset(labels.items())
            by_key[key] = _add(name, by_key[key], value) if key in by_key else value
    for name, metric in metrics.items():
        metric.samples = [
            Sample(sample_name, dict(sorted(labels)), value)
            for (sample_name, labels), value in values[name].items()
        ]
        yield metric


def _add(name: str, value: float, other: float) -> float:
    if name in _LARGEST:
        return max(value, other)
    return min(value, other) if name in _SMALLEST else value + other
