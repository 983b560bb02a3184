"""A real server with several processes, its workers one by one, and clients in processes of their own that call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deconvd.v1 import deconvd_pb2 as pb
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.worker_servers import ask, own_targets, pid_of, wait_for_serving, workers_of

__all__ = ["ClientProcess", "WorkerHost", "running_clients", "running_host"]

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


@dataclass
class WorkerHost:
    """A server with several workers."""

    server: ServerProcess

    def signal_worker(self, name: str, number: int) -> None:
        """Send a signal to a worker, and wait until another process has begun in its place."""
        pid = pid_of(self.server, name)
        os.kill(pid, number)
        wait_until(lambda: pid_of(self.server, name) != pid)

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
    directory: Path, *options: str, count: int = 2, listen: tuple[str, ...] = ("unix",)
) -> Iterator[WorkerHost]:
    """Run a server with `count` workers for the block, all of which serve."""
    with server_process(directory, "--processes", str(count), *options, listen=listen) as server:
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
            process = subprocess.Popen(
                [sys.executable, "-c", _CLIENT, target, transport],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.send_signal, signal.SIGKILL)
            clients.append(ClientProcess(process))
        for client in clients:
            assert client.process.stdout is not None
            line = client.process.stdout.readline()
            assert line == "ready\n", client.process.communicate()[1]
        yield clients
