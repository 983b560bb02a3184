"""What metrics cost a small call, and what a scrape takes: ``python -m benchmarks.metrics --time-s 20 --json FILE``.

Two servers take turns of a second: one without metrics, and one whose metrics a third process scrapes once in each
turn. A machine that is slower for a while is slower for both. The second part times scrapes alone, by the number of
tenants whose calls have been counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import click
import numpy as np

import deconvd_client
from benchmarks.transport.timing import write_rows
from deconvd.host.startup_line import address_in_startup_line
from deconvd_server.call.context import CallContext
from deconvd_server.call.counts import CallCounts
from deconvd_server.call.ledger import Stage
from deconvd_server.metrics.collector import MetricsView
from deconvd_server.metrics.request import parse_head
from deconvd_server.metrics.server import metrics_response

_TRANSPORTS: Final = ("shared_memory", "unix", "tcp", "grpc")
_TURN_S: Final = 1.0
_LEAST_ROUNDS: Final = 2
_WARM_UPS: Final = 50
_TENANTS_COUNTS: Final = (1, 64, 512)
_SCRAPES_COUNT: Final = 20

_SCRAPER: Final = """
import sys, urllib.request
for _ in sys.stdin:
    urllib.request.urlopen(sys.argv[1]).read()
"""
"""A program that scrapes once for each line on its standard input."""


@dataclass(frozen=True)
class CallRow:
    """Small calls by one transport, in milliseconds: the medians, the means and the slowest of a hundred."""

    transport: str
    off_ms: float
    on_ms: float
    off_mean_ms: float
    on_mean_ms: float
    off_p99_ms: float
    on_p99_ms: float


@dataclass(frozen=True)
class ScrapeRow:
    """One scrape, compressed as for Prometheus, by how many tenants have called: its milliseconds of the processor."""

    tenants: int
    size_bytes: int
    scrape_ms: float


@click.command()
@click.option("--transport", "transports", multiple=True, default=_TRANSPORTS)
@click.option("--time-s", default=20.0, show_default=True, help="For each transport.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(transports: Sequence[str], time_s: float, json_file: Path | None) -> None:
    """Time small calls of a server with metrics and of one without, in turns, and scrapes."""
    call_rows = [_time_calls(transport, time_s) for transport in transports]
    print(f"{'small calls, ms':16} {'off':>8} {'on':>8} {'ratio':>6} {'mean':>6} {'p99':>6}")
    for row in call_rows:
        print(
            f"{row.transport:16} {row.off_ms:8.4f} {row.on_ms:8.4f} {row.on_ms / row.off_ms:6.3f} "
            f"{row.on_mean_ms / row.off_mean_ms:6.3f} {row.on_p99_ms / row.off_p99_ms:6.3f}"
        )
    scrape_rows = [_time_scrapes(count) for count in _TENANTS_COUNTS]
    for scrape in scrape_rows:
        print(
            f"a scrape with {scrape.tenants} tenants: {scrape.scrape_ms:.1f} ms, "
            f"{scrape.size_bytes} bytes"
        )
    if json_file is not None:
        write_rows(json_file, [*map(asdict, call_rows), *map(asdict, scrape_rows)])


def _time_calls(transport: str, time_s: float) -> CallRow:
    off_s: list[float] = []
    on_s: list[float] = []
    with ExitStack() as stack:
        off, _ = stack.enter_context(_server(transport))
        on, scrape = stack.enter_context(_server(transport, "--metrics-port", "0"))
        turns = [(off, off_s, _do_nothing), (on, on_s, scrape)]
        for call, _, _ in turns:
            _turn_s(call, _WARM_UPS)
        began_s = time.perf_counter()
        rounds_count = 0
        while rounds_count < _LEAST_ROUNDS or time.perf_counter() - began_s < time_s:
            for call, times_s, begin in turns:
                begin()
                times_s += _turn_s(call)
            turns.reverse()  # so that neither is always the first
            rounds_count += 1
    medians = (statistics.median(times_s) * 1e3 for times_s in (off_s, on_s))
    means = (statistics.fmean(times_s) * 1e3 for times_s in (off_s, on_s))
    slowest = (float(np.quantile(times_s, 0.99)) * 1e3 for times_s in (off_s, on_s))
    return CallRow(transport, *medians, *means, *slowest)


def _turn_s(call: Callable[[], object], most_count: int = sys.maxsize) -> list[float]:
    """Return what each call of a turn took."""
    times_s: list[float] = []
    end_s = time.perf_counter() + _TURN_S
    while len(times_s) < most_count:
        start_s = time.perf_counter()
        if start_s > end_s:
            break
        call()
        times_s.append(time.perf_counter() - start_s)
    return times_s


@contextmanager
def _server(
    transport: str, *options: str
) -> Iterator[tuple[Callable[[], object], Callable[[], None]]]:
    """Run a server for the block. Its value makes a call, and begins a scrape if the options ask for metrics."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        address = "127.0.0.1:0" if transport == "tcp" else f"unix:{directory}/s"
        quiet = ("-m", "deconvd_server", "--log-level", "warning", "--device", "cpu")
        server = subprocess.Popen(
            [sys.executable, *quiet, "--listen", address, *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert server.stdout is not None
        stack.enter_context(server.stdout)
        target = address_in_startup_line(server.stdout.readline())
        F = stack.enter_context(deconvd_client.connect(target, transport=transport))
        x, W = np.ones((1, 4, 8, 8), np.float32), np.ones((4, 4, 3, 3), np.float32)
        call = partial(F.deconvolution_2d, x, W)
        if not options:
            yield call, _do_nothing
            return
        where = server.stdout.readline().split()[3]
        command = [sys.executable, "-c", _SCRAPER, f"http://{where}/metrics"]
        scraper = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
        assert scraper.stdin is not None
        yield call, partial(print, file=scraper.stdin, flush=True)


def _do_nothing() -> None:
    pass


def _time_scrapes(tenants_count: int) -> ScrapeRow:
    counts = _counts_of(tenants_count)
    view = MetricsView(counts, lambda: None, lambda: True, lambda: 0, ())
    request = parse_head(b"GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n")
    times_s: list[float] = []
    answer = b""
    for _ in range(_SCRAPES_COUNT):
        start_s = time.thread_time()
        answer = metrics_response(request, view.collector_for(""))
        times_s.append(time.thread_time() - start_s)
    return ScrapeRow(tenants_count, len(answer), statistics.median(times_s) * 1e3)


def _counts_of(tenants_count: int) -> CallCounts:
    """Return counts of calls of two methods, each with two statuses, for each tenant."""
    counts = CallCounts()
    for number in range(tenants_count):
        for method, status in product(("Deconvolve", "DeconvolveGrad"), ("OK", "UNAVAILABLE")):
            call = CallContext(identity=f"tenant-{number}", transport="tcp")
            call.ledger.times_us[Stage.COMPUTE] = number
            counts.begin(method, call)
            counts.end(method, call, status, None)
    return counts


if __name__ == "__main__":
    main()
