"""Makes metrics of what the server counts anyway, whenever somebody asks. Calls take no part in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

import deconvd
from deconvd.wire.cache_state import CacheState
from deconvd.wire.server_counts import MethodCounts, ServerCounts, StageTimes
from deconvd_server.backend import Backend
from deconvd_server.call.counts import CallCounts
from deconvd_server.metrics.reader_collector import ReaderCollector

__all__ = ["MetricsView"]

_FIRST_BUCKET, _LAST_BUCKET = 6, 24

_BUCKETS_S: Final = tuple(2.0**bits / 1e6 for bits in range(_FIRST_BUCKET, _LAST_BUCKET + 1))
"""The bounds of the buckets: 64 us, 128 us, … 16.8 s. Fewer than the server has, and with the same bounds."""

_CALL: Final = ("method", "transport", "tenant")
_CACHE: Final = ("device", "cache")


class MetricsView:
    """The metrics of a server, and who may see which of them.

    Args:
        call_counts: What is counted of calls.
        backend: Returns what has devices; None while there is none.
        is_ready: Returns whether health is SERVING.
        refused_count: Returns how many calls were refused since they proved no identity.
        readers: The identities that see the calls of all tenants, and what all tenants keep.
    """

    def __init__(
        self,
        call_counts: CallCounts,
        backend: Callable[[], Backend | None],
        is_ready: Callable[[], bool],
        refused_count: Callable[[], int],
        readers: Collection[str],
    ) -> None:
        self._call_counts = call_counts
        self._backend = backend
        self._is_ready = is_ready
        self._refused_count = refused_count
        self._readers = frozenset(readers)
        registry = CollectorRegistry()
        self._process = ProcessCollector(registry=registry), PlatformCollector(registry=registry)

    def collector_for(self, identity: str) -> Collector:
        """Return the metrics that a reader may see.

        Args:
            identity: The name that it has proved. Empty if the server asks for none: then everyone sees all.
        """
        return ReaderCollector(self.collect, identity, self._readers)

    def collect(self, identity: str) -> Iterator[Metric]:
        """Yield the metrics of an identity's calls and of the server, or all if it is empty."""
        for collector in self._process:
            yield from collector.collect()
        yield InfoMetricFamily(
            "deconvd", "The version of the server.", {"version": deconvd.__version__}
        )
        yield GaugeMetricFamily(
            "deconvd_ready", "Whether health is SERVING: 1 or 0.", int(self._is_ready())
        )
        if not identity:
            yield CounterMetricFamily(
                "deconvd_unauthenticated_calls",
                "Calls that were refused since they proved no identity.",
                self._refused_count(),
            )
        yield from _call_metrics(
            {identity: self._call_counts.methods(identity)}
            if identity
            else self._call_counts.methods_by_tenant()
        )
        yield _stage_metric(self._call_counts.stages(identity))
        backend = self._backend()
        if backend is not None:
            yield from _use_metrics(backend.counts(identity))
            yield from _device_metrics(backend, sees_all=not identity)


def _call_metrics(by_tenant: Mapping[str, Sequence[MethodCounts]]) -> Iterator[Metric]:
    ended = CounterMetricFamily(
        "deconvd_calls",
        "Calls that have ended, by the names of their gRPC statuses.",
        labels=("method", "status", "transport", "tenant"),
    )
    received = CounterMetricFamily(
        "deconvd_received_bytes",
        "Bytes of operands that clients have sent, or written into shared memory.",
        labels=_CALL,
    )
    sent = CounterMetricFamily(
        "deconvd_sent_bytes",
        "Bytes of results that the server has sent, or written into shared memory.",
        labels=_CALL,
    )
    running_counts: dict[tuple[str, str], int] = {}
    for tenant, methods in by_tenant.items():
        for counts in methods:
            method, transport = counts.method, counts.transport
            for status, count in counts.ended.items():
                ended.add_metric((method, status, transport, tenant), count)
            received.add_metric((method, transport, tenant), counts.received_bytes)
            sent.add_metric((method, transport, tenant), counts.sent_bytes)
            key = (method, transport)
            running_counts[key] = running_counts.get(key, 0) + counts.running_count
    running = GaugeMetricFamily(
        "deconvd_calls_running",
        "Calls that have not ended, including those that wait.",
        labels=("method", "transport"),
    )
    for key, count in running_counts.items():
        running.add_metric(key, count)
    yield from (ended, running, received, sent)


def _stage_metric(stages: Sequence[StageTimes]) -> Metric:
    metric = HistogramMetricFamily(
        "deconvd_call_stage_seconds",
        "How long each stage took of the calls that waited for a device or used one.",
        labels=("stage",),
    )
    for times in stages:
        buckets = [
            (str(bound_s), float(sum(times.counts[: _FIRST_BUCKET + index + 1])))
            for index, bound_s in enumerate(_BUCKETS_S)
        ]
        buckets.append(("+Inf", float(times.count)))
        metric.add_metric((times.stage,), buckets, times.total_us / 1e6)
    return metric


def _use_metrics(counts: ServerCounts) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "deconvd_memory_bytes", "Host memory in use, by its kind.", labels=("kind",)
    )
    limit = GaugeMetricFamily(
        "deconvd_memory_limit_bytes", "The limit of each kind.", labels=("kind",)
    )
    for memory in counts.memory:
        used.add_metric((memory.name,), memory.used_bytes)
        limit.add_metric((memory.name,), memory.limit_bytes)
    yield from (used, limit)
    for name, text, count in (
        ("sessions", "Open sessions.", counts.sessions_count),
        ("direct_connections", "Direct connections.", counts.direct_connections_count),
        (
            "borrowers",
            "Clients that are connected to borrow shared memory.",
            counts.borrowers_count,
        ),
    ):
        yield GaugeMetricFamily(f"deconvd_{name}", text, count)
    streams = GaugeMetricFamily(
        "deconvd_streams",
        "Streams and striped calls that have their memory, or wait for it.",
        labels=("state",),
    )
    streams.add_metric(("running",), counts.running_streams_count)
    streams.add_metric(("waiting",), counts.waiting_streams_count)
    yield streams


def _device_metrics(backend: Backend, *, sees_all: bool) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "deconvd_device_info", "The maker's name of a device. Always 1.", labels=("device", "name")
    )
    calls = GaugeMetricFamily(
        "deconvd_device_calls",
        "Calls that run on a device, or wait for it.",
        labels=("device", "state"),
    )
    delay = GaugeMetricFamily(
        "deconvd_queue_wait_seconds",
        "How long a further call would wait for a place on a device, as the server estimates.",
        labels=("device",),
    )
    refused = CounterMetricFamily(
        "deconvd_refused_calls",
        "Calls that were refused, since too many wait for a device, or residents leave no room.",
        labels=("device", "reason"),
    )
    busy = CounterMetricFamily(
        "deconvd_device_busy_seconds",
        "Time in which at least one call has run on a device.",
        labels=("device",),
    )
    wait = GaugeMetricFamily(
        "deconvd_device_wait_seconds",
        "How long the oldest kernel or copy under way has been waited for. 0 if there is none.",
        labels=("device",),
    )
    used = GaugeMetricFamily(
        "deconvd_device_memory_bytes",
        "Memory of a device, by its use.",
        labels=("device", "use"),
    )
    limit = GaugeMetricFamily(
        "deconvd_device_memory_limit_bytes", "The limit of all uses together.", labels=("device",)
    )
    caches: list[tuple[str, CacheState]] = []
    for engine in backend.engines:
        device, load = engine.info.id, engine.load
        info.add_metric((device, engine.info.name), 1)
        calls.add_metric((device, "running"), load.running_count)
        calls.add_metric((device, "waiting"), load.waiting_count)
        delay.add_metric((device,), load.wait_s)
        for reason, count in load.refused_counts.items():
            refused.add_metric((device, reason), count)
        busy.add_metric((device,), engine.busy_us / 1e6)
        wait.add_metric((device,), max(time.monotonic() - engine.waiting_since_s, 0))
        used.add_metric((device, "calls"), load.used_bytes)
        if sees_all:
            used.add_metric((device, "reserved"), load.reserved_bytes)
        limit.add_metric((device,), engine.info.budget_bytes)
        caches += [(device, state) for state in engine.caches]
    if sees_all:
        caches += backend.residents.registry.whole_states().items()
    yield from (info, calls, delay, refused, busy, wait, used, limit)
    yield from _cache_metrics(caches)


def _cache_metrics(states: Sequence[tuple[str, CacheState]]) -> Iterator[Metric]:
    entries = GaugeMetricFamily("deconvd_cache_entries", "Entries of a cache.", labels=_CACHE)
    size = GaugeMetricFamily(
        "deconvd_cache_bytes", "Size of all entries of a cache.", labels=_CACHE
    )
    limit = GaugeMetricFamily(
        "deconvd_cache_limit_bytes", "Largest size of all entries.", labels=_CACHE
    )
    hits = CounterMetricFamily(
        "deconvd_cache_hits", "How often a requested entry was in the cache.", labels=_CACHE
    )
    misses = CounterMetricFamily(
        "deconvd_cache_misses",
        "How often a requested entry had to be made or brought.",
        labels=_CACHE,
    )
    evictions = CounterMetricFamily(
        "deconvd_cache_evictions", "How often an entry had to make room for others.", labels=_CACHE
    )
    for device, state in states:
        key = (device, state.name)
        entries.add_metric(key, state.count)
        size.add_metric(key, state.size_bytes)
        limit.add_metric(key, state.limit_bytes)
        hits.add_metric(key, state.hits_count)
        misses.add_metric(key, state.misses_count)
        evictions.add_metric(key, state.evictions_count)
    yield from (entries, size, limit, hits, misses, evictions)
