"""What a server did between two samples of what it counts, as rates.

Counters start at 0 again when the server starts again. What they count then, the new server has done since its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deconvd.wire.cache_state import CacheState
from deconvd.wire.server_counts import MemoryUse, MethodCounts, ServerCounts, StageTimes
from deconvd_client.server_info import DeviceDescription, ServerInfo

__all__ = [
    "CacheRates",
    "DeviceRates",
    "LoadRates",
    "MethodRates",
    "Sample",
    "StageRates",
    "quantile_us",
    "rates_between",
]

_OK = "OK"
_OF_TENANTS = "resident tensors"
"""How the names of the caches begin that are counted for each tenant. Who only watches has no tenant, and sees none."""

_OWN_METHOD = "GetServerInfo"
"""What this program and others call to watch a server. It does not count as a call in the sum over all methods."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server has told of itself, and when, by the monotonic clock of this host."""

    info: ServerInfo
    taken_s: float


@dataclass(frozen=True, slots=True)
class MethodRates:
    """The calls of one method by one transport.

    Attributes:
        calls_per_s: Calls that have ended.
        failures_per_s: Those of them whose status is not OK.
        failures: How many calls have failed, by status.
        running_count: Calls that have not ended now.
    """

    method: str
    transport: str
    calls_per_s: float
    failures_per_s: float
    failures: Mapping[str, int]
    running_count: int
    received_bytes_per_s: float
    sent_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class StageRates:
    """The times of one stage, of calls that have ended.

    Attributes:
        p50_ms, p99_ms: Quantiles, estimated from a histogram whose bounds are powers of two.
    """

    stage: str
    calls_count: int
    mean_ms: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class CacheRates:
    """A cache.

    Attributes:
        hit_part: How many of the requested entries were there, as a part of 1; None if none was requested.
    """

    name: str
    count: int
    size_bytes: int
    limit_bytes: int
    hit_part: float | None
    evictions_per_s: float


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """A device.

    Attributes:
        caches: Those that are not counted for each tenant.
        busy_part: The part of the time in which at least one call ran; None if the server does not know.
    """

    id: str
    name: str
    busy_part: float | None
    running_calls_count: int
    waiting_calls_count: int
    used_bytes: int
    budget_bytes: int
    caches: tuple[CacheRates, ...]


@dataclass(frozen=True, slots=True)
class LoadRates:
    """What a server did in an interval, and what it has in use at its end.

    Attributes:
        duration_s: How long the interval was.
        is_restarted: Whether the server started in it.
        uptime_s: How long the server has been running; None, as all that follows but the devices, if it does not count.
        calls_per_s, failures_per_s: Those of all methods, but for what watches the server.
    """

    version: str
    duration_s: float
    is_restarted: bool
    devices: tuple[DeviceRates, ...]
    uptime_s: float | None = None
    calls_per_s: float | None = None
    failures_per_s: float | None = None
    received_bytes_per_s: float | None = None
    sent_bytes_per_s: float | None = None
    methods: tuple[MethodRates, ...] | None = None
    stages: tuple[StageRates, ...] | None = None
    memory: tuple[MemoryUse, ...] | None = None
    sessions_count: int | None = None
    direct_connections_count: int | None = None
    borrowers_count: int | None = None
    running_streams_count: int | None = None
    waiting_streams_count: int | None = None


def rates_between(before: Sample | None, after: Sample) -> LoadRates | None:
    """Return what a server did between two samples; None if that is not known.

    It is not known if there is no sample before, and if another server answers now that had started before that: a
    balancer's next one, say. The server's own clock measures the time, so the way to it does not matter.
    """
    if before is None:
        return None
    counts, earlier = after.info.counts, before.info.counts
    is_restarted = after.info.instance_id != before.info.instance_id
    duration_s = after.taken_s - before.taken_s
    if counts is not None:
        uptime_s = counts.uptime_us / 1e6
        if is_restarted:
            if uptime_s > duration_s:
                return None
            duration_s, earlier = uptime_s, None
        elif earlier is not None:
            duration_s = uptime_s - earlier.uptime_us / 1e6
    duration_s = max(duration_s, 1e-6)
    devices_before = {} if is_restarted else {device.id: device for device in before.info.devices}
    devices = tuple(
        _device_rates(
            devices_before.get(device.id), device, duration_s, knows_busy=counts is not None
        )
        for device in after.info.devices
    )
    if counts is None:
        return LoadRates(after.info.version, duration_s, is_restarted, devices)
    methods = _methods_rates(earlier, counts, duration_s)
    calls = [each for each in methods if each.method != _OWN_METHOD]
    return LoadRates(
        version=after.info.version,
        duration_s=duration_s,
        is_restarted=is_restarted,
        devices=devices,
        uptime_s=counts.uptime_us / 1e6,
        calls_per_s=sum(each.calls_per_s for each in calls),
        failures_per_s=sum(each.failures_per_s for each in calls),
        received_bytes_per_s=sum(each.received_bytes_per_s for each in calls),
        sent_bytes_per_s=sum(each.sent_bytes_per_s for each in calls),
        methods=methods,
        stages=_stages_rates(earlier, counts),
        memory=counts.memory,
        sessions_count=counts.sessions_count,
        direct_connections_count=counts.direct_connections_count,
        borrowers_count=counts.borrowers_count,
        running_streams_count=counts.running_streams_count,
        waiting_streams_count=counts.waiting_streams_count,
    )


def quantile_us(counts: Sequence[int], part: float) -> float:
    """Return the time that a part of the calls in a histogram did not exceed. Inside a bucket they are taken as even.

    Args:
        counts: As in `StageTimes`.
    """
    rank, seen = part * sum(counts), 0
    for index, count in enumerate(counts):
        if count and seen + count >= rank:
            low_us = 1 << index >> 1 if index else 0
            return low_us + ((1 << index) - low_us) * max(rank - seen, 0) / count
        seen += count
    return 0.0


def _methods_rates(
    earlier: ServerCounts | None, counts: ServerCounts, duration_s: float
) -> tuple[MethodRates, ...]:
    before = {} if earlier is None else {(m.method, m.transport): m for m in earlier.methods}
    nothing = MethodCounts("", "", {}, 0, 0, 0)
    rates: list[MethodRates] = []
    for now in counts.methods:
        then = before.get((now.method, now.transport), nothing)
        ended = {status: count - then.ended.get(status, 0) for status, count in now.ended.items()}
        failures = {status: n for status, n in ended.items() if status != _OK and n}
        rates.append(
            MethodRates(
                method=now.method,
                transport=now.transport,
                calls_per_s=sum(ended.values()) / duration_s,
                failures_per_s=sum(failures.values()) / duration_s,
                failures=failures,
                running_count=now.running_count,
                received_bytes_per_s=(now.received_bytes - then.received_bytes) / duration_s,
                sent_bytes_per_s=(now.sent_bytes - then.sent_bytes) / duration_s,
            )
        )
    return tuple(rates)


def _stages_rates(earlier: ServerCounts | None, counts: ServerCounts) -> tuple[StageRates, ...]:
    before = {} if earlier is None else {times.stage: times for times in earlier.stages}
    rates: list[StageRates] = []
    for now in counts.stages:
        then = before.get(now.stage, StageTimes(now.stage, 0, 0, ()))
        calls_count = now.count - then.count
        if not calls_count:
            continue
        padded = then.counts + (0,) * (len(now.counts) - len(then.counts))
        new = [count - old for count, old in zip(now.counts, padded, strict=True)]
        rates.append(
            StageRates(
                stage=now.stage,
                calls_count=calls_count,
                mean_ms=(now.total_us - then.total_us) / calls_count / 1e3,
                p50_ms=quantile_us(new, 0.5) / 1e3,
                p99_ms=quantile_us(new, 0.99) / 1e3,
            )
        )
    return tuple(rates)


def _device_rates(
    then: DeviceDescription | None, now: DeviceDescription, duration_s: float, *, knows_busy: bool
) -> DeviceRates:
    caches_before = {} if then is None else {cache.name: cache for cache in then.caches}
    busy_us = now.busy_us - (0 if then is None else then.busy_us)
    return DeviceRates(
        id=now.id,
        name=now.name,
        busy_part=min(busy_us / 1e6 / duration_s, 1.0) if knows_busy else None,
        running_calls_count=now.running_calls_count,
        waiting_calls_count=now.waiting_calls_count,
        used_bytes=now.used_bytes,
        budget_bytes=now.budget_bytes,
        caches=tuple(
            _cache_rates(caches_before.get(cache.name), cache, duration_s)
            for cache in now.caches
            if not cache.name.startswith(_OF_TENANTS)
        ),
    )


def _cache_rates(then: CacheState | None, now: CacheState, duration_s: float) -> CacheRates:
    hits, misses, evictions = now.hits_count, now.misses_count, now.evictions_count
    if then is not None:
        hits -= then.hits_count
        misses -= then.misses_count
        evictions -= then.evictions_count
    return CacheRates(
        name=now.name,
        count=now.count,
        size_bytes=now.size_bytes,
        limit_bytes=now.limit_bytes,
        hit_part=hits / (hits + misses) if hits + misses > 0 else None,
        evictions_per_s=max(evictions, 0) / duration_s,
    )
