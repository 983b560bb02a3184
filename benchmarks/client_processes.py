"""Client processes of a benchmark: started once, they do the same work at the same time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import TypeAlias, TypeVar

__all__ = ["ClientProcesses", "Meet", "start_client_processes"]

_T = TypeVar("_T")

Meet: TypeAlias = Callable[[], int]
"""Waits, in a client, until each of the clients that work together has called it. Each gets its own number, from 0."""


class ClientProcesses:
    """Processes to call from, each of which has started."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def run(self, clients_count: int, work: Callable[..., _T], *arguments: object) -> list[_T]:
        """Let this number of processes do some work together, and return what each has found.

        A process that fails ends the waiting of the others, and its error is raised. No more work can be done then.

        Args:
            work: A function of a module, of a `Meet` and the arguments. It must meet at least once: so no process does
                the work of two.
        """
        works = [
            self._executor.submit(_work, clients_count, work, *arguments)
            for _ in range(clients_count)
        ]
        errors = [error for each in works if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [each.result() for each in works]


@contextmanager
def start_client_processes(clients_counts: Iterable[int]) -> Iterator[ClientProcesses]:
    """Give processes for the block, of which any of these numbers can work together."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    barriers = {count: context.Barrier(count) for count in clients_counts}
    with ProcessPoolExecutor(max(barriers), context, _begin_client, (barriers,)) as executor:
        clients = ClientProcesses(executor)
        clients.run(max(barriers), _start)
        yield clients


_barriers: dict[int, Barrier] = {}
"""In a client: where this number of them wait for each other."""


def _begin_client(barriers: Mapping[int, Barrier]) -> None:
    _barriers.update(barriers)


def _start(meet: Meet) -> None:
    meet()


def _work(clients_count: int, work: Callable[..., _T], *arguments: object) -> _T:
    barrier = _barriers[clients_count]
    try:
        return work(barrier.wait, *arguments)
    except BaseException:
        barrier.abort()
        raise
