"""The command `python -m benchmarks.secure`: prints what a token and TLS cost, and writes the rows as JSON.

Ours and the bare program of `deconvd_client.cli.bare_sockets` take turns, so a machine that is slower for a while is
slower for both.

Below a mebibyte a call of the bare program follows one of ours without TLS, whose time does not count. A program that
calls us works in between, and OpenSSL has left the processor's caches when the next call comes. A loop that does
nothing else keeps it there. What TLS adds to such a loop is printed, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import click
import numpy as np

from benchmarks.secure.rows import SMALL_BYTES, SecureRow, comparisons
from benchmarks.secure.ways import BareCalls, BarePrograms, BareWay, Keys, Way, open_ways
from benchmarks.transport.paths import RoundTrip
from benchmarks.transport.timing import burst_s, human, tensor, write_rows
from deconvd.model.dtypes import Array

_DEFAULT_BYTES: Final = (1 << 10, 32 << 20)
_LEAST_ROUNDS: Final = 4
"""Of each size: at least these are made, and more until their time is over."""

_BARE_SOCKETS: Final = {"shared_memory": "unix", "unix": "unix", "tcp": "tcp", "grpc_tcp": "tcp"}


@click.command()
@click.option("--bytes", "sizes", type=int, multiple=True, default=_DEFAULT_BYTES)
@click.option("--time-s", default=60.0, show_default=True, help="For each size.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(sizes: Sequence[int], time_s: float, json_file: Path | None) -> None:
    """Time round trips, plain, with a token and with TLS, and those of the bare program, in turns."""
    rows: list[SecureRow] = []
    hot_us: dict[int, float] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        keys = Keys.make(Path(folder))
        ways = stack.enter_context(open_ways(keys))
        programs = stack.enter_context(BarePrograms(keys))
        for size in sizes:
            x = tensor(size)
            for round_trip in ways.values():
                np.testing.assert_array_equal(round_trip(x), x)
            with programs.calls(x) as bare_calls:
                times = _Times(ways, bare_calls, x)
                times.measure(time_s)
            rows += times.rows()
            if size < SMALL_BYTES:
                hot_us[size] = times.hot_us()
    for row in rows:
        print(
            f"{row.path:14} {row.secured:6} {human(row.bytes):>8} {row.ms:9.3f} ms, "
            f"bare {row.floor_ms:9.3f}"
        )
    for line in comparisons(rows, hot_us):
        print(line)
    if json_file is not None:
        write_rows(json_file, [asdict(row) for row in rows])


class _Times:
    """What calls of one size take.

    Args:
        ways: Our calls.
        bare_calls: Those of the bare program.
        x: What is sent.
    """

    def __init__(self, ways: Mapping[Way, RoundTrip], bare_calls: BareCalls, x: Array) -> None:
        self._is_small = x.nbytes < SMALL_BYTES
        self._ours = {way: partial(round_trip, x) for way, round_trip in ways.items()}
        self._bare_calls = bare_calls
        self._size_bytes = x.nbytes
        self._ours_s: dict[Way, list[float]] = {way: [] for way in ways}
        self._bare_s: dict[BareWay, list[float]] = {way: [] for way in bare_calls}
        self._hot_s: dict[BareWay, list[float]] = {way: [] for way in bare_calls}

    def measure(self, time_s: float) -> None:
        """Make rounds over all ways for a time."""
        end_s = time.perf_counter() + time_s
        rounds_count = 0
        while rounds_count < _LEAST_ROUNDS or time.perf_counter() < end_s:
            for way, call in self._ours.items():
                self._ours_s[way] += burst_s(call)
            for bare_way, bare_call in self._bare_calls.items():
                if self._is_small:
                    ours = self._ours[Way("unix" if bare_way.socket == "unix" else "tcp", "plain")]
                    self._bare_s[bare_way] += burst_s(bare_call, ours)
                    self._hot_s[bare_way] += burst_s(bare_call)
                else:
                    self._bare_s[bare_way] += burst_s(bare_call)
            rounds_count += 1

    def rows(self) -> Iterator[SecureRow]:
        """Return a row for each of our ways."""
        for way, times_s in self._ours_s.items():
            ms, floor_ms = statistics.median(times_s) * 1e3, self._floor_ms(way)
            yield SecureRow(way.path, way.secured, self._size_bytes, ms, floor_ms)

    def hot_us(self) -> float:
        """Return what TLS adds to a small call of the bare program that does nothing in between."""
        tls, tcp = (statistics.median(self._hot_s[BareWay(s, 1)]) for s in ("tls", "tcp"))
        return (tls - tcp) * 1e6

    def _floor_ms(self, way: Way) -> float:
        """Return the median of the fastest number of connections."""
        socket = "tls" if way.secured == "tls" else _BARE_SOCKETS[way.path]
        return 1e3 * min(
            statistics.median(times_s)
            for bare_way, times_s in self._bare_s.items()
            if bare_way.socket == socket
            and (bare_way.connections_count == 1 or way.path != "grpc_tcp")
        )


if __name__ == "__main__":
    main()
