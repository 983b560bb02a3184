"""Three real servers behind one name: at one port of three addresses of this host, as three hosts would be."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path
from statistics import mode

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_client import Connection, RemoteTensor
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, server_process, stop_server

__all__ = [
    "FILTERS",
    "HOSTS",
    "LARGE",
    "MAX_LOSS_S",
    "TWO",
    "Fleet",
    "Load",
    "X",
    "check_stickiness",
    "checked",
    "lose_no_call",
    "middle_server",
    "places_of_filters",
    "repeat_calls",
    "restart_all",
    "running_fleet",
    "wait_for_serving",
    "wait_until_used",
]

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

MAX_LOSS_S = 2.0 + 4.0
"""What a call may lose by a server that stops, and the slack of a machine that has other things to do."""

_random = np.random.default_rng(0)
X = _random.standard_normal((2, 8, 4, 4)).astype(np.float32)
FILTERS = [_random.standard_normal((8, 32, 8, 8)).astype(np.float32) for _ in range(30)]
"""Filters of 64 KiB: servers keep them, so that each of them has its server."""

LARGE = _random.standard_normal((12, 2, 512, 512)).astype(np.float32)
"""A batch of 24 MiB."""

TWO = _random.standard_normal((2, 2, 1, 1)).astype(np.float32)

_OLD = """
import deconvd_server.service.deconvolution as service
assert "use_cudnn_tensor_core" in service._FEATURES
service._FEATURES = ("resident_tensors",)
service.WIDE_SUMS = "unknown"
"""
"""Makes a server say that it knows nothing that the first versions did not know."""

_runs = count()
_CALL = re.compile(r" Deconvolve\w* \w+ from .*\(request (\S+)\): OK ")


class Fleet:
    """Three servers, the last of which is an old version. They can be restarted at their addresses."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self._device = device
        self.port = free_port()
        self.targets = [f"{host}:{self.port}" for host in HOSTS]
        self.servers: list[ServerProcess] = []
        self._directory = directory
        self._stacks = [ExitStack() for _ in HOSTS]
        self._logs: list[list[Path]] = [[] for _ in HOSTS]
        self._read_bytes: dict[Path, int] = {}
        self._places: dict[str, list[int]] = {}

    def start(self) -> None:
        """Start all of them, at the same time."""
        with ThreadPoolExecutor() as pool:
            self.servers = list(pool.map(self._start, range(len(HOSTS))))

    def restart(self, number: int) -> None:
        """Start the server at an address where another one has ended."""
        self._stacks[number].close()
        self.servers[number] = self._start(number)

    def close(self) -> None:
        """Kill all of them."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ExitStack.close, self._stacks))

    def places(self, names: Sequence[str], times: int = 1) -> list[list[int]]:
        """Return for each of some calls the numbers of the servers that have served it, `times` times in all.

        Args:
            names: The names of the calls, as `Connection.using_request_id` sets them.
        """

        def are_there() -> bool:  # the log of a call is written once it has been answered
            self._read_logs()
            return all(len(self._places.get(name, ())) >= times for name in names)

        wait_until(are_there)
        return [sorted(self._places[name]) for name in names]

    def _read_logs(self) -> None:
        """Note where calls were served, from the lines that have been added to the logs."""
        for number, logs in enumerate(self._logs):
            for log in logs:
                begin = self._read_bytes.get(log, 0)
                with log.open("rb") as file:
                    file.seek(begin)
                    text = file.read()
                end = text.rfind(b"\n") + 1  # a line may be half written
                self._read_bytes[log] = begin + end
                for name in _CALL.findall(text[:end].decode()):
                    self._places.setdefault(name, []).append(number)

    def _start(self, number: int) -> ServerProcess:
        directory = self._directory / f"server-{number}-{len(self._logs[number])}"
        directory.mkdir()
        running = self._stacks[number].enter_context(
            server_process(
                directory,
                "--access-log",
                device=self._device,
                listen=(self.targets[number],),
                prelude=_OLD if number == len(HOSTS) - 1 else "",
            )
        )
        self._logs[number].append(running.log)
        return running


@contextmanager
def running_fleet(directory: Path, device: str = "cpu") -> Iterator[Fleet]:
    """Run three servers for the block."""
    fleet = Fleet(directory, device)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()


class Load:
    """What the threads of `repeat_calls` have done.

    Attributes:
        count: How many calls have ended.
        slowest_s: How long the slowest of them took.
        failures: What was wrong.
    """

    def __init__(self) -> None:
        self.count = 0
        self.slowest_s = 0.0
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def note(self, took_s: float) -> None:
        """Note a call that has ended."""
        with self._lock:
            self.count += 1
            self.slowest_s = max(self.slowest_s, took_s)

    def wait_for(self, more_count: int) -> None:
        """Return once so many more calls have ended, or one was wrong."""
        until_count = self.count + more_count
        wait_until(lambda: self.count >= until_count or bool(self.failures))


@contextmanager
def repeat_calls(calls: Sequence[Callable[[], object]]) -> Iterator[Load]:
    """Have each function called again and again in a thread of its own during the block. They must not fail."""
    load, ended = Load(), threading.Event()

    def repeat(call: Callable[[], object]) -> None:
        while not (ended.is_set() or load.failures):
            begin_s = time.monotonic()
            try:
                call()
            except Exception as error:
                load.failures.append(repr(error))
            load.note(time.monotonic() - begin_s)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def checked(F: Connection, x: Array, W: Array | RemoteTensor) -> Callable[[], None]:
    """Return a function that makes a call, and raises an error unless each bit is as now."""
    expected = F.deconvolution_2d(x, W)

    def call() -> None:
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)

    return call


def places_of_filters(fleet: Fleet, *connections: Connection) -> list[list[int]]:
    """Call three times with each filter, and return the numbers of the servers that it was at."""
    run = next(_runs)
    names = [f"filter-{run}-{number}" for number in range(len(FILTERS))]
    for _, F in zip(range(3), cycle(connections), strict=False):
        for name, W in zip(names, FILTERS, strict=True):
            with F.using_request_id(name):
                F.deconvolution_2d(X, W)
    return fleet.places(names, 3)


def middle_server(places: Sequence[list[int]]) -> int:
    """Return the number of the server with neither the most nor the fewest filters."""
    homes = [mode(each) for each in places]
    return sorted(range(len(HOSTS)), key=homes.count)[1]


def check_stickiness(
    before: list[list[int]], later: list[list[int]], lost: int, strays_part: float = 0.0
) -> None:
    """Check that calls with one filter went to one server, and that only those of a lost one went elsewhere then.

    Args:
        before, later: What `places_of_filters` has returned before and after the loss.
        strays_part: Which part of the others may go elsewhere, too.
    """
    for places in before, later:
        sticky_count = sum(Counter(each).most_common(1)[0][1] for each in places)
        assert sticky_count >= 0.95 * 3 * len(FILTERS)
    pairs = [(mode(one), mode(other)) for one, other in zip(before, later, strict=True)]
    assert all(other != lost for _, other in pairs)
    lost_count = sum(one == lost for one, _ in pairs)
    assert len(FILTERS) // 6 <= lost_count <= len(FILTERS) // 2  # about one third
    strays_count = sum(lost != one != other for one, other in pairs)
    assert strays_count <= strays_part * (len(FILTERS) - lost_count)


def lose_no_call(fleet: Fleet, F: Connection) -> None:
    """Check that a thousand calls succeed while servers are killed, stopped and drained."""
    resident = F.put(FILTERS[3])
    checks = cycle([checked(F, X, W) for W in FILTERS[:3]])
    calls = [lambda: next(checks)(), checked(F, X, resident)]
    with repeat_calls(calls) as load:
        kill_stop_and_drain(fleet, F, load)
        load.wait_for(1000 - load.count)

    assert load.failures == []
    assert load.count >= 1000
    assert load.slowest_s < MAX_LOSS_S


def kill_stop_and_drain(fleet: Fleet, F: Connection, load: Load) -> None:
    """Have one server killed, one stopped and one drained, each of them back before the next goes."""
    load.wait_for(50)
    fleet.servers[0].end(signal.SIGKILL)
    load.wait_for(50)
    fleet.restart(0)
    wait_until_used(fleet, F, 0)
    with stop_server(fleet.servers[1]):
        load.wait_for(50)
    wait_until_used(fleet, F, 1)
    assert fleet.servers[2].end() == 0
    load.wait_for(50)
    fleet.restart(2)
    wait_until_used(fleet, F, 2)


def restart_all(fleet: Fleet, F: Connection) -> None:
    """Check that no call fails while all servers are restarted, one after the other."""
    checks = cycle([checked(F, X, W) for W in FILTERS[:3]])
    call_large = checked(F, LARGE, TWO)
    with repeat_calls([lambda: next(checks)()]) as load:
        for number in range(len(HOSTS)):
            load.wait_for(10)
            assert fleet.servers[number].end() == 0
            call_large()
            fleet.restart(number)
            wait_until_used(fleet, F, number)

    assert load.failures == []


def wait_until_used(fleet: Fleet, F: Connection, number: int) -> None:
    """Call with one filter after the other until a server has served one, which was away."""
    name = f"back-{next(_runs)}"
    filters = cycle(FILTERS)

    def is_used() -> bool:
        with F.using_request_id(name):
            F.deconvolution_2d(X, next(filters))
        return number in fleet.places([name])[0]

    wait_until(is_used)


def wait_for_serving(F: Connection, count: int) -> None:
    """Return once a connection knows that so many of its servers serve."""
    wait_until(lambda: f"{count} of " in repr(F))
