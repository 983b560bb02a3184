"""Client processes of a benchmark: started once, they do the same work at the same time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import TypeAlias, TypeVar

__all__ = ["ClientProcesses", "Meet", "start_client_processes"]

_T = TypeVar("_T")

Meet: TypeAlias = Callable[[], int]
"""Waits, in a client, until each of the clients that work together has called it. Each gets its own number, from 0."""


class ClientProcesses:
    """Processes to call from. The first of them are used first, so what a process keeps is of use in its next work.

    Args:
        executors: One for each process.
        barriers: Where the processes meet, by their number.
    """

    def __init__(
        self, executors: list[ProcessPoolExecutor], barriers: Mapping[int, Barrier]
    ) -> None:
        self._executors = executors
        self._barriers = barriers

    def run(self, clients_count: int, work: Callable[..., _T], *arguments: object) -> list[_T]:
        """Let this number of processes do some work together, and return what each of them returned.

        A process that fails, or dies, ends the waiting of the others, and its error is raised.

        Args:
            work: A function of a module, of a `Meet` and the arguments.
        """
        works = [
            executor.submit(_work, clients_count, work, *arguments)
            for executor in self._executors[:clients_count]
        ]
        barrier = self._barriers[clients_count]
        _, rest = wait(works, return_when=FIRST_EXCEPTION)
        if rest:
            barrier.abort()
        errors = [error for each in works if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [each.result() for each in works]


@contextmanager
def start_client_processes(clients_counts: Iterable[int]) -> Iterator[ClientProcesses]:
    """Give processes for the block, of which any of these numbers can work together. Each of them has started."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    barriers = {count: context.Barrier(count) for count in clients_counts}
    with ExitStack() as stack:
        executors = [
            stack.enter_context(ProcessPoolExecutor(1, context, _begin_client, (barriers,)))
            for _ in range(max(barriers))
        ]
        clients = ClientProcesses(executors, barriers)
        clients.run(max(barriers), _start)
        yield clients


_barriers: dict[int, Barrier] = {}
"""In a client: where this number of them wait for each other."""


def _begin_client(barriers: Mapping[int, Barrier]) -> None:
    _barriers.update(barriers)


def _start(meet: Meet) -> None:
    meet()


def _work(clients_count: int, work: Callable[..., _T], *arguments: object) -> _T:
    return work(_barriers[clients_count].wait, *arguments)
