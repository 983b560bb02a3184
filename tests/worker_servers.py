"""Servers of several processes, and what tells their processes apart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import grpc

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from tests.processes import wait_until
from tests.servers import ServerProcess

__all__ = [
    "Stub",
    "ask",
    "own_targets",
    "pid_of",
    "pids",
    "stock_session",
    "stock_stub",
    "wait_for_serving",
    "workers_of",
]

Stub: TypeAlias = pb_grpc.DeconvolutionServiceStub


@contextmanager
def stock_stub(target: str) -> Iterator[Stub]:
    """Give a stub of a channel that shares its connection with no other one."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options) as channel:
        yield Stub(channel)


def ask(target: str) -> pb.GetServerInfoResponse:
    """Return what a server says of itself over a new connection."""
    with stock_stub(target) as stub:
        return stub.GetServerInfo(pb.GetServerInfoRequest(), wait_for_ready=True, timeout=30)


def workers_of(server: ServerProcess) -> Sequence[pb.Worker]:
    """Return the processes of a server, as one of them knows them."""
    return ask(server.target).workers


def own_targets(worker: pb.Worker) -> list[str]:
    """Return where one worker alone answers, on this host."""
    tcp = [f"127.0.0.1:{worker.grpc_port}"] if worker.grpc_port else []
    return tcp + [f"unix:{path}" for path in worker.unix_sockets]


def wait_for_serving(server: ServerProcess, count: int = 2) -> Sequence[pb.Worker]:
    """Wait until so many processes serve, and each of them knows. Return all processes."""
    found: list[Sequence[pb.Worker]] = [()]

    def are_there() -> bool:
        try:
            found[0] = workers_of(server)
            others = [ask(own_targets(each)[-1]).workers for each in found[0] if each.is_serving]
        except grpc.RpcError:  # of one that has ended, and is listed for a moment
            return False
        counts = [sum(worker.is_serving for worker in workers) for workers in (found[0], *others)]
        return counts == [count] * (1 + count)

    wait_until(are_there)
    return found[0]


def pids(server: ServerProcess) -> list[int]:
    """Return the ids of the processes that a server has started and that have not ended."""
    pid = server.process.pid
    words = [
        Path(f"/proc/{pid}/task/{task}/children").read_text()
        for task in os.listdir(f"/proc/{pid}/task")
    ]
    return sorted(int(word) for text in words for word in text.split())


def pid_of(server: ServerProcess, name: str) -> int:
    """Return the id of the last process that a worker has had."""
    started = re.findall(rf"worker {name} \(\S+\): process (\d+) starts", server.log.read_text())
    return int(started[-1])


@contextmanager
def stock_session(stub: Any) -> Iterator[bytes]:
    """Hold a session, and give its name."""
    end: SimpleQueue[None] = SimpleQueue()

    def signs() -> Iterator[pb.HoldSessionRequest]:
        yield pb.HoldSessionRequest()
        end.get()

    responses = stub.HoldSession(signs())
    try:
        yield next(responses).session
    finally:
        end.put(None)
