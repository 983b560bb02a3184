"""A server under load: ``python -m benchmarks.load --json FILE``.

Clients in other processes call a server in a process of its own by gRPC, in an open loop (`benchmarks.open_loop`):
calls are due at random times, and none is made again. Each computes for at least 20 ms where it is alone. First the
rate is measured at which calls end if two are under way, which is the capacity. Then 1 to 64 clients of one tenant
offer a quarter of that, and twice as much; and a quarter again while another tenant offers twice the capacity. What is
measured of a call is the time from when it was due until its answer is there.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from benchmarks.client_processes import ClientProcesses, Meet, start_client_processes
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.open_loop import CallTimes, call_at_rate, find_request, open_callers
from deconvd.errors import UnavailableError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.access.tokens import TokenHash
from examples.local_server import local_server

_LEAST_S: Final = 0.02
_CLIENTS_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64)
_LIGHT: Final = 0.25
_HEAVY: Final = 2.0
_FLOOD_CLIENTS_COUNT: Final = 16
_PROCESSES_COUNT: Final = 2
"""Processes of clients. Each client has a connection of its own."""

_CAPACITY_S: Final = 2.0
_SETTLE_S: Final = 0.5
"""A pause between two measurements, in which the server's memory of the one before fades."""

_ONE, _OTHER = "one" * 11, "other" * 7
"""The tokens of two tenants."""


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What became of one tenant's calls; its fields are those of the JSON file.

    Attributes:
        clients: How many clients the tenant has.
        load: What they offer, as a multiple of the capacity.
        tenant: ``plain`` if it is alone; ``beside a flood`` if another floods the server, which is ``flood``.
        calls_per_s: How many calls were served.
        p50_ms, p99_ms, p999_ms: Percentiles of their times, from when they were due.
        refused: How many calls were refused.
        refused_p99_ms: How long that took.
        retry_after_p50_ms: When they were told to come back.
    """

    clients: int
    load: float
    tenant: str
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    refused: int
    refused_p99_ms: float
    retry_after_p50_ms: float

    @classmethod
    def of(
        cls, clients: int, load: float, tenant: str, times: CallTimes, duration_s: float
    ) -> LoadRow:
        """Return the row of what became of calls."""
        refused = CallTimes(accepted_s=times.refused_s)
        retries = CallTimes(accepted_s=times.retry_after_s)
        return cls(
            clients=clients,
            load=load,
            tenant=tenant,
            calls_per_s=round(len(times.accepted_s) / duration_s, 1),
            p50_ms=round(times.percentile_ms(50), 1),
            p99_ms=round(times.percentile_ms(99), 1),
            p999_ms=round(times.percentile_ms(99.9), 1),
            refused=len(times.refused_s),
            refused_p99_ms=round(refused.percentile_ms(99), 1),
            retry_after_p50_ms=round(retries.percentile_ms(50), 1),
        )

    def __str__(self) -> str:
        return (
            f"{self.clients:7} {self.load:5.2f} {self.tenant:15} {self.calls_per_s:7.1f} {self.p50_ms:7.1f} "
            f"{self.p99_ms:7.1f} {self.p999_ms:7.1f} {self.refused:8}"
        )


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one tenant offers: calls a second from a number of clients."""

    token: str
    clients_count: int
    calls_per_s: float


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option(
    "--time-s", "duration_s", default=5.0, show_default=True, help="How long a row is measured."
)
@click.option(
    "--clients",
    "clients_counts",
    type=click.IntRange(min=1),
    multiple=True,
    default=_CLIENTS_COUNTS,
    show_default=True,
)
@click.option("--json", "path", type=click.Path(path_type=Path), help="File for the rows.")
def main(device: str, duration_s: float, clients_counts: Sequence[int], path: Path | None) -> None:
    rows: list[LoadRow] = []
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory, "tokens")
        lines = [TokenHash.of(name, token).as_line() for name, token in _tenants()]
        tokens.write_text("\n".join(lines) + "\n")
        tokens.chmod(0o600)
        options = ("--tokens", str(tokens), "--log-level", "error")
        with (
            local_server(device, *options, address="127.0.0.1:0") as target,
            start_client_processes([_PROCESSES_COUNT, 2 * _PROCESSES_COUNT]) as processes,
        ):
            request, alone_s = find_request(target, _LEAST_S, _ONE)
            capacity = _capacity_per_s(target, request)
            print(f"a call alone takes {alone_s * 1e3:.1f} ms; capacity: {capacity:.1f} calls/s")
            print("clients  load tenant          calls/s  p50 ms  p99 ms p999 ms  refused")
            for row in _rows(
                _LoadSetup(target, request, capacity, duration_s, processes), clients_counts
            ):
                rows.append(row)
                print(row, flush=True)
    if path is not None:
        about = {
            "card": card_name(device),
            "host": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "alone_ms": round(alone_s * 1e3, 2),
            "capacity_per_s": round(capacity, 2),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        report = about | {"rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(report, indent=1) + "\n")


def _tenants() -> list[tuple[str, str]]:
    return [("one", _ONE), ("other", _OTHER)]


@dataclass(frozen=True, slots=True)
class _LoadSetup:
    """What is measured: a server, what it is called with, and the processes of its clients."""

    target: str
    request: pb.DeconvolveRequest
    capacity_per_s: float
    duration_s: float
    processes: ClientProcesses

    def measure(self, *offers: _Offer) -> list[CallTimes]:
        """Return what became of the calls of each offer."""
        time.sleep(_SETTLE_S)
        measured = self.processes.run(
            _PROCESSES_COUNT * len(offers),
            _offer_calls,
            self.target,
            self.request.SerializeToString(),
            offers,
            self.duration_s,
        )
        times = [CallTimes() for _ in offers]
        for number, some in measured:
            times[number].add(some)
        return times


def _rows(setup: _LoadSetup, clients_counts: Sequence[int]) -> Iterator[LoadRow]:
    capacity, duration_s = setup.capacity_per_s, setup.duration_s
    for count in clients_counts:
        for load in (_LIGHT, _HEAVY):
            (times,) = setup.measure(_Offer(_ONE, count, load * capacity))
            yield LoadRow.of(count, load, "plain", times, duration_s)
        beside, flood = setup.measure(
            _Offer(_ONE, count, _LIGHT * capacity),
            _Offer(_OTHER, _FLOOD_CLIENTS_COUNT, _HEAVY * capacity),
        )
        yield LoadRow.of(count, _LIGHT, "beside a flood", beside, duration_s)
        yield LoadRow.of(_FLOOD_CLIENTS_COUNT, _HEAVY, "flood", flood, duration_s)


def _offer_calls(
    meet: Meet, target: str, request: bytes, offers: Sequence[_Offer], duration_s: float
) -> tuple[int, CallTimes]:
    """Make a process's part of the calls; return which offer they are of, and what became of them."""
    own_number = meet()
    number, part = divmod(own_number, _PROCESSES_COUNT)
    offer = offers[number]
    # the clients of an offer are divided among its processes; a process without one has nothing to do
    clients_count = len(range(part, offer.clients_count, _PROCESSES_COUNT))
    message = pb.DeconvolveRequest.FromString(request)
    with open_callers(target, message, [offer.token] * clients_count) as callers:
        for caller in callers:  # connections are made before it begins
            caller.connect()
        meet()
        if not callers:
            return number, CallTimes()
        rate = offer.calls_per_s * clients_count / offer.clients_count
        return number, call_at_rate(callers, rate, duration_s, seed=own_number)


def _capacity_per_s(target: str, request: pb.DeconvolveRequest) -> float:
    """Return how many calls end in a second if two are under way all the time: more would only wait."""
    with open_callers(target, request, [_ONE, _OTHER]) as callers:
        under_way = [caller.begin() for caller in callers]
        count, begin_s = 0, time.perf_counter()
        while (passed_s := time.perf_counter() - begin_s) < _CAPACITY_S:
            for number, caller in enumerate(callers):
                error = under_way[number].exception()
                if error is None:
                    count += 1
                elif error.code().name != UnavailableError.status:
                    raise error
                under_way[number] = caller.begin()
        for future in under_way:
            future.cancel()
    return count / passed_s


if __name__ == "__main__":
    main()
