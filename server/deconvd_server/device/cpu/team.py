"""Threads that share the tasks of a call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar, TypeVarTuple

__all__ = ["Team"]

Item = TypeVar("Item")
T = TypeVarTuple("T")


class Team:
    """A calling thread and its helpers, who share tasks that are independent of each other.

    The caller works too, so a small call makes progress while the helpers are busy with a large one.

    Args:
        threads_count: How many threads work for one caller at most, the caller's own counted.
    """

    def __init__(self, threads_count: int) -> None:
        self.threads_count = threads_count
        self._helpers = ThreadPoolExecutor(max(threads_count - 1, 1), thread_name_prefix="cpu")

    def run(self, task: Callable[[*T], None], arguments: Iterable[tuple[*T]]) -> None:
        """Call `task` with each of the arguments, and return when all have been done.

        If a task raises, no further one is begun, and the error is raised once those under way have ended.
        """
        pending = deque(arguments)

        def work() -> None:
            try:
                while (mine := _pop(pending)) is not None:
                    task(*mine)
            except BaseException:
                pending.clear()
                raise

        helpers = [
            self._helpers.submit(work) for _ in range(min(self.threads_count, len(pending)) - 1)
        ]
        try:
            work()
        finally:
            # Of those that never began nothing is to come; waiting for them as well would be
            # waiting for whatever keeps the helpers busy.
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        # An error holds this frame. It must not hold the error, or the call's arrays would stay until
        # the garbage collector finds the two.
        helpers.clear()
        while begun:
            begun.pop().result()

    def close(self) -> None:
        """End the helpers once they are idle."""
        self._helpers.shutdown()


def _pop(pending: deque[Item]) -> Item | None:
    # popleft is atomic; asking for the length first would race with the other threads
    try:
        return pending.popleft()
    except IndexError:
        return None
