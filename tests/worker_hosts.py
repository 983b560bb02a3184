"""A real server with several processes, its workers one by one, and clients in processes of their own that call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deconvd.v1 import deconvd_pb2 as pb
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.worker_servers import ask, own_targets, pid_of, wait_for_serving, workers_of

__all__ = [
    "ClientProcess",
    "ClientProcesses",
    "WorkerHost",
    "homes_of_children",
    "running_client_processes",
    "running_clients",
    "running_host",
]

_CLIENT = """
import json, sys, threading
import numpy as np
import deconvd_client

x, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)
large = np.ones((8, 8, 64, 64), np.float32)
F = deconvd_client.connect(sys.argv[1], transport=sys.argv[2])
expected, expected_large = F.deconvolution_2d(x, W), F.deconvolution_2d(large, W)
calls_count, is_over = 0, threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
print("ready", flush=True)
while not is_over.wait(0.01):  # so that a worker that starts gets a processor, too
    assert np.array_equal(F.deconvolution_2d(x, W), expected)
    assert np.array_equal(F.deconvolution_2d(large, W), expected_large)
    calls_count += 2
print(json.dumps(calls_count))
"""

_CLIENTS = """
import json, sys, threading
import numpy as np
import deconvd_client
from deconvd_client.workers import home_keeper, worker_membership

home_keeper._NAMED_INTERVAL_S = 3600.0  # clients stay where they are
worker_membership._HOME_TIMEOUT_S = worker_membership._VERIFY_TIMEOUT_S = 30.0
x, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)

class Client(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.F, self.has_home, self.is_over = None, threading.Event(), threading.Event()
        self.start()

    @property
    def home(self):
        return self.F._server._way._keeper.home.identity.decode()

    def run(self):
        with deconvd_client.connect(sys.argv[1]) as self.F:
            while not self.is_over.wait(0.05):
                self.F.deconvolution_2d(x, W)
                if hasattr(self.F._server._way, "_keeper"):
                    self.has_home.set()

clients = []
print(json.dumps([]), flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "begin":
        clients += [Client() for _ in range(int(words[0]))]
        for client in clients:
            assert client.has_home.wait(60)
    if verb == "leave":
        leaving = [client for client in clients if client.home in words]
        for client in leaving:
            client.is_over.set()
        for client in leaving:
            client.join()
        clients = [client for client in clients if client not in leaving]
    print(json.dumps([client.home for client in clients]), flush=True)
"""

_FORKING = """
import json, os, sys, traceback
import numpy as np
import deconvd_client
from deconvd_client.workers import home_keeper, worker_membership

home_keeper._CHILD_PATIENCE_S = 60.0
worker_membership._HOME_TIMEOUT_S = worker_membership._VERIFY_TIMEOUT_S = 30.0
x, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)
F = deconvd_client.connect(sys.argv[1])
expected = F.deconvolution_2d(x, W)
while not hasattr(F._server._way, "_keeper"):
    F.deconvolution_2d(x, W)

def work(number):
    if number % 2:  # the first that a child does is at its own home
        large = F.empty((1 << 20,), "f4")
        workers = F._server._way._membership.workers
        (home,) = [m for m in workers if m.server.borrower.locate(large) is not None]
        assert home is F._server._way._keeper.home
    assert np.array_equal(F.deconvolution_2d(x, W), expected)
    return F._server._way._keeper.home.identity

results, ends = os.pipe(), os.pipe()
for number in range(int(sys.argv[2])):
    if not os.fork():
        os.close(ends[1])
        try:
            home = work(number)
        except BaseException:
            traceback.print_exc()
            home = b"-"
        os.write(results[1], home)
        os.read(ends[0], 1)  # all are there until the last one has its home
        os._exit(0)
os.close(results[1])
homes = b""
while len(homes) < int(sys.argv[2]):
    homes += os.read(results[0], 64)
print(json.dumps([F._server._way._keeper.home.identity.decode(), *homes.decode()]))
os.close(ends[1])
"""


@dataclass
class WorkerHost:
    """A server with several workers."""

    server: ServerProcess

    def signal_worker(self, name: str, number: int) -> None:
        """Send a signal to a worker, and wait until another process has begun in its place."""
        pid = pid_of(self.server, name)
        os.kill(pid, number)
        wait_until(lambda: pid_of(self.server, name) != pid)

    def told_counts(self) -> set[tuple[int, ...]]:
        """Return how many active connections all workers have, as each of them says that serves."""
        return {
            tuple(worker.active_connections_count for worker in info.workers)
            for info in self._ask_all()
        }

    def active_counts(self) -> list[int]:
        """Return how many active connections each worker that serves has, as it says itself."""
        return [
            each.active_connections_count
            for info in self._ask_all()
            for each in info.workers
            if each.name == info.worker_name
        ]

    def calls_counts(self) -> dict[str, int]:
        """Return how many deconvolutions each worker that serves has served."""
        return {
            info.worker_name: sum(
                ended.count
                for each in info.counts.methods
                if each.method == "Deconvolve"
                for ended in each.ended
            )
            for info in self._ask_all()
        }

    def _ask_all(self) -> list[pb.GetServerInfoResponse]:
        return [
            ask(own_targets(worker)[-1]) for worker in workers_of(self.server) if worker.is_serving
        ]


@contextmanager
def running_host(
    directory: Path,
    *options: str,
    count: int = 2,
    listen: tuple[str, ...] = ("unix",),
    constants: Mapping[str, float] | None = None,
) -> Iterator[WorkerHost]:
    """Run a server with `count` workers for the block, all of which serve. The others are as for `server_process`."""
    with server_process(
        directory, "--processes", str(count), *options, listen=listen, constants=constants
    ) as server:
        host = WorkerHost(server)
        wait_for_serving(server, count)
        yield host


@dataclass
class ClientProcess:
    """A client with one thread, which calls again and again and compares each result."""

    process: subprocess.Popen[str]

    def end(self) -> int:
        """Let it end, and return how many calls it has made. It fails if one of them has failed."""
        output, errors = self.process.communicate("", timeout=60)
        assert self.process.returncode == 0, errors
        count = json.loads(output)
        assert isinstance(count, int)
        return count


@contextmanager
def running_clients(targets: Sequence[tuple[str, str]]) -> Iterator[list[ClientProcess]]:
    """Run a client for each target and transport, until the end of the block at the latest."""
    with ExitStack() as stack:
        clients: list[ClientProcess] = []
        for target, transport in targets:
            clients.append(ClientProcess(_start(stack, _CLIENT, target, transport)))
        for client in clients:
            assert client.process.stdout is not None
            line = client.process.stdout.readline()
            assert line == "ready\n", client.process.communicate()[1]
        yield clients


class ClientProcesses:
    """Processes with several clients each, which call again and again, each at the home that the server has named."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._answers()

    def begin(self, count: int) -> list[str]:
        """Have each process begin so many clients, all together. Return the homes of all."""
        return self._order(f"begin {count}")

    def homes(self) -> list[str]:
        """Return the homes of all clients."""
        return self._order("homes")

    def leave(self, *names: str) -> list[str]:
        """Have the clients end that have some workers as their homes. Return the homes of the others."""
        return self._order(" ".join(["leave", *names]))

    def _order(self, line: str) -> list[str]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[str]:
        homes: list[str] = []
        for process in self._processes:
            assert process.stdout is not None
            answer = process.stdout.readline()
            assert answer, process.communicate()[1]
            homes += json.loads(answer)
        return homes


@contextmanager
def running_client_processes(target: str, count: int) -> Iterator[ClientProcesses]:
    """Run processes with clients, none of which has begun yet, for the block."""
    with ExitStack() as stack:
        yield ClientProcesses([_start(stack, _CLIENTS, target) for _ in range(count)])


def _start(stack: ExitStack, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python program that takes orders and answers, which is killed at the end of the stack."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.communicate)
    stack.callback(process.send_signal, signal.SIGKILL)
    return process


def homes_of_children(target: str, count: int) -> list[str]:
    """Return the home of a process, and those of so many others that it has forked in one moment."""
    ended = subprocess.run(
        [sys.executable, "-c", _FORKING, target, str(count)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    homes: list[str] = json.loads(ended.stdout)
    assert "-" not in homes, ended.stderr
    return homes
