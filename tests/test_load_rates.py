"""Rates of a server's counters: differences, also where counters start again."""

from __future__ import annotations

import math

import pytest

from deconvd.wire.cache_state import CacheState
from deconvd.wire.server_counts import MethodCounts, ServerCounts, StageTimes
from deconvd_client.cli.formats import format_bytes, format_duration, format_part
from deconvd_client.cli.load_rates import LoadRates, Sample, quantile_us, rates_between
from deconvd_client.server_info import DeviceDescription, ServerInfo


def server_counts(
    uptime_s: float, calls_count: int, failures_count: int = 0, times: StageTimes | None = None
) -> ServerCounts:
    ended = {"OK": calls_count, "UNAVAILABLE": failures_count}
    return ServerCounts(
        uptime_us=round(uptime_s * 1e6),
        methods=(
            MethodCounts("Deconvolve", "unix", ended, 1, 1000 * calls_count, 2000 * calls_count),
            MethodCounts("GetServerInfo", "grpc", {"OK": 100 * calls_count}, 1, 0, 0),
        ),
        stages=() if times is None else (times,),
        memory=(),
        sessions_count=0,
        direct_connections_count=1,
        borrowers_count=0,
        running_streams_count=0,
        waiting_streams_count=0,
    )


def sample(
    taken_s: float,
    counts: ServerCounts | None,
    instance: str = "a",
    busy_us: int = 0,
    cache: CacheState | None = None,
) -> Sample:
    caches = () if cache is None else (cache,)
    device = DeviceDescription("cuda:0", "a card", 100, 0, 80, 8, 1, 2, caches, busy_us)
    return Sample(ServerInfo("1", (device,), (), 1, (), 0, instance, counts), taken_s)


def rates_of(before: Sample, after: Sample) -> LoadRates:
    rates = rates_between(before, after)
    assert rates is not None
    return rates


def test_rates_are_differences_over_the_servers_own_time() -> None:
    before = sample(7, server_counts(100, 50, 1))
    after = sample(90, server_counts(102, 70, 5))

    rates = rates_of(before, after)

    assert rates.duration_s == pytest.approx(2)
    assert not rates.is_restarted
    assert rates.calls_per_s == pytest.approx(12)  # 20 and 4, without GetServerInfo
    assert rates.failures_per_s == pytest.approx(2)
    assert rates.received_bytes_per_s == pytest.approx(10_000)
    assert rates.sent_bytes_per_s == pytest.approx(20_000)
    assert rates.methods is not None
    assert rates.methods[0].failures == {"UNAVAILABLE": 4}
    assert rates.methods[1].calls_per_s == pytest.approx(1000)


def test_after_a_restart_counters_are_what_the_new_server_did() -> None:
    before = sample(7, server_counts(100, 50), busy_us=900_000)
    after = sample(9, server_counts(0.5, 30), instance="b", busy_us=250_000)

    rates = rates_of(before, after)

    assert rates.is_restarted
    assert rates.duration_s == pytest.approx(0.5)
    assert rates.calls_per_s == pytest.approx(60)
    assert rates.received_bytes_per_s == pytest.approx(60_000)
    assert rates.devices[0].busy_part == pytest.approx(0.5)


def test_nothing_is_known_of_another_server_that_started_before_the_interval() -> None:
    before, after = sample(7, server_counts(100, 50)), sample(9, server_counts(60, 5), "b")

    assert rates_between(before, after) is None
    assert rates_between(None, after) is None


def test_a_server_that_does_not_count_has_devices_and_caches_alone() -> None:
    cache = CacheState("plans", 1, 2, 3, 10, 4)
    later = CacheState("plans", 1, 2, 3, 16, 6)

    rates = rates_of(sample(7, None, cache=cache), sample(9, None, cache=later))

    assert rates.duration_s == pytest.approx(2)
    assert rates.methods is None
    assert rates.calls_per_s is None
    assert rates.devices[0].busy_part is None
    assert rates.devices[0].caches[0].hit_part == pytest.approx(0.75)


def test_a_caches_hits_are_those_of_the_interval() -> None:
    cache = CacheState("plans", 1, 2, 3, 1000, 0, 5)
    later = CacheState("plans", 1, 2, 3, 1000, 4, 9)

    same = rates_of(
        sample(7, server_counts(1, 0), cache=cache), sample(8, server_counts(2, 0), cache=cache)
    )
    rates = rates_of(
        sample(7, server_counts(1, 0), cache=cache), sample(9, server_counts(3, 0), cache=later)
    )

    assert same.devices[0].caches[0].hit_part is None
    assert rates.devices[0].caches[0].hit_part == 0
    assert rates.devices[0].caches[0].evictions_per_s == pytest.approx(2)


def test_residents_are_left_out_since_who_watches_has_none() -> None:
    residents = CacheState("resident tensors in host memory", 0, 0, 3, 0, 0)

    rates = rates_of(sample(7, None), sample(8, None, cache=residents))

    assert rates.devices[0].caches == ()


def test_stages_are_those_of_the_calls_of_the_interval() -> None:
    before = StageTimes("compute", 1000, 1000, (0, 1000))
    after = StageTimes("compute", 1004, 1000 + 4 * 3000, (0, 1000, *(0,) * 10, 4))

    rates = rates_of(
        sample(7, server_counts(1, 0, times=before)), sample(8, server_counts(2, 0, times=after))
    )
    idle = rates_of(
        sample(7, server_counts(1, 0, times=after)), sample(8, server_counts(2, 0, times=after))
    )

    assert rates.stages is not None
    (compute,) = rates.stages
    assert compute.calls_count == 4
    assert compute.mean_ms == pytest.approx(3)
    assert 2.048 <= compute.p50_ms <= compute.p99_ms <= 4.096
    assert idle.stages == ()


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99, 1.0])
def test_a_quantile_is_in_the_bucket_that_has_it(part: float) -> None:
    times_us = [0, 1, 5, 5, 70, 900, 3000, 10**6]
    counts = [0] * 21
    for time_us in times_us:
        counts[time_us.bit_length()] += 1

    exact_us = sorted(times_us)[math.ceil(part * len(times_us)) - 1]

    bits = exact_us.bit_length()
    assert (1 << bits >> 1 if bits else 0) <= quantile_us(counts, part) <= 1 << bits


def test_there_is_no_quantile_of_nothing() -> None:
    assert quantile_us((), 0.5) == 0


def test_sizes_times_and_parts_have_units() -> None:
    sizes = [format_bytes(size) for size in (0, 999, 1000, 999_949, 999_951, 1.5e9, 2e12, 3e15)]
    times = [format_duration(time_s) for time_s in (59.9, 60, 3601, 90_000)]

    assert sizes == [
        *("0 B", "999 B", "1.0 kB", "999.9 kB"),
        *("1.0 MB", "1.5 GB", "2.0 TB", "3000.0 TB"),
    ]
    assert times == ["59 s", "1 min 0 s", "1 h 0 min", "1 d 1 h"]
    assert (format_part(None), format_part(0.256)) == ("-", "26 %")
