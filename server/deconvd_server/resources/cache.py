"""A cache of resources that are costly to build and must be freed, such as plans.

Locks: a cache has one lock, which guards its entries, too. Resources are built and freed without it, so `build` and
`free` may take other locks, and may lease from other caches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

__all__ = ["Cache", "CacheEntry", "CacheStats", "EntryState", "Resource"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_POLL_PERIOD_S = 0.05
"""How often a thread that waits for a build checks whether its own call is still wanted."""


class EntryState(StrEnum):
    """State of an entry: see `CacheEntry`."""

    LIVE = "live"
    RETIRED = "retired"
    FREED = "freed"


@dataclass(frozen=True, slots=True)
class Resource(Generic[V]):
    """What a build returns.

    Attributes:
        value: What users get.
        size_bytes: Its size, which counts against the cache's limit.
        free: Called once, after the last user. Must not raise.
    """

    value: V
    size_bytes: int
    free: Callable[[], None] = lambda: None


class CacheEntry(Generic[V]):
    """One resource, shared by its users, freed after the last of them.

        LIVE --retire--> RETIRED --last release--> FREED

    A retired entry keeps the users it has and takes no new ones. Not thread-safe: its owner calls it
    under one lock.

    Args:
        free: Called, under that lock, with the resource when it must be freed.
    """

    def __init__(self, resource: Resource[V], free: Callable[[Resource[V]], None]) -> None:
        self.resource = resource
        self.state = EntryState.LIVE
        self._free = free
        self._users = 0

    @property
    def users_count(self) -> int:
        """How many users it has."""
        return self._users

    def acquire(self) -> None:
        if self.state is not EntryState.LIVE:
            raise RuntimeError(f"cannot acquire a {self.state.value} entry")
        self._users += 1

    def release(self) -> None:
        if self._users == 0:
            raise RuntimeError("released more often than acquired")
        self._users -= 1
        self._settle()

    def retire(self) -> None:
        """Take no new users. Retiring twice is harmless."""
        if self.state is EntryState.LIVE:
            self.state = EntryState.RETIRED
            self._settle()

    def _settle(self) -> None:
        if self.state is EntryState.RETIRED and self._users == 0:
            self.state = EntryState.FREED
            self._free(self.resource)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How many resources a cache has, and how often they were found.

    Attributes:
        count: Live resources.
        size_bytes: Their total size.
        hits_count: Leases that found a live resource.
        misses_count: Leases that built one, or waited for another thread's build.
        evictions_count: Resources that were retired to make room for others.
    """

    count: int
    size_bytes: int
    hits_count: int
    misses_count: int
    evictions_count: int


class Cache(Generic[K, V]):
    """Resources by key, bounded in bytes: the least recently used are retired first. Thread-safe.

    Each key is built once, even if several threads ask for it at the same time. There is no method that
    tells whether a key is present: its answer could be wrong by the time it is returned.

    Args:
        limit_bytes: Limit for the total size of live resources. A resource that is larger is freed after the
            threads that lease it now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, CacheEntry[V]] = OrderedDict()
        self._builds: dict[K, Future[CacheEntry[V]]] = {}
        self._garbage: list[Resource[V]] = []
        self._size_bytes = 0
        self._hits_count = 0
        self._misses_count = 0
        self._evictions_count = 0
        self._closed = False

    @contextmanager
    def lease(
        self,
        key: K,
        build: Callable[[], Resource[V]],
        *,
        check: Callable[[], None] = lambda: None,
        executor: Executor | None = None,
        build_at_once: Callable[[], Resource[V] | None] = lambda: None,
    ) -> Iterator[V]:
        """Lend the resource of `key` for the length of a with-block.

        Args:
            build: Makes the resource if it is not there. What it raises is raised in all threads that wait for
                it, and is not remembered.
            check: Called now and then during the wait for a build. What it raises ends the wait.
            executor: Where to build. By default the calling thread builds, and cannot give up until it is done.
            build_at_once: Tried before `build`, in the calling thread, as a hand-over to another one takes longer than
                some resources. Returns None where it would take long.
        """
        entry = self._acquire(key, build, check, executor, build_at_once)
        try:
            yield entry.resource.value
        finally:
            self._release(entry)

    def drop(self, key: K) -> None:
        """Retire the resource of `key`, if it is there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._retire(key, entry)
        self._sweep()

    def close(self) -> None:
        """Retire all resources. Those built from now on are retired at once."""
        with self._lock:
            self._closed = True
            for key, entry in list(self._entries.items()):
                self._retire(key, entry)
        self._sweep()

    @property
    def stats(self) -> CacheStats:
        """Its size and its hits and misses now."""
        with self._lock:
            return CacheStats(
                len(self._entries),
                self._size_bytes,
                self._hits_count,
                self._misses_count,
                self._evictions_count,
            )

    def _acquire(
        self,
        key: K,
        build: Callable[[], Resource[V]],
        check: Callable[[], None],
        executor: Executor | None,
        build_at_once: Callable[[], Resource[V] | None],
    ) -> CacheEntry[V]:
        missed = False
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    return self._acquire_live(key, entry, missed=missed)
                self._misses_count += not missed
                missed = True
                other_build = self._builds.get(key)
                if other_build is None:
                    own_build = self._builds[key] = Future[CacheEntry[V]]()
            if other_build is None:
                if not self._build(key, build_at_once, own_build):
                    self._start(key, build, own_build, executor)
                return self._wait_for_own_build(own_build, check)
            _wait_for_build(other_build, check)  # and look again: it may be retired by then

    def _acquire_live(self, key: K, entry: CacheEntry[V], *, missed: bool) -> CacheEntry[V]:
        self._entries.move_to_end(key)
        self._hits_count += not missed
        entry.acquire()
        return entry

    def _start(
        self,
        key: K,
        build: Callable[[], Resource[V]],
        future: Future[CacheEntry[V]],
        executor: Executor | None,
    ) -> None:
        if executor is None:
            self._build(key, build, future)
            return
        try:
            executor.submit(self._build, key, build, future)
        except RuntimeError as error:  # the executor was shut down, or cannot start a thread now
            self._fail(key, future, error)

    def _build(
        self, key: K, build: Callable[[], Resource[V] | None], future: Future[CacheEntry[V]]
    ) -> bool:
        """End a build with a resource or an error. Return False, with the build still to do, if there is neither."""
        if future.done():  # `_start` failed, but the executor had queued the build before it raised
            return True
        try:
            resource = build()
        except BaseException as error:  # noqa: BLE001 - whatever it is, each that waits for the build gets it
            self._fail(key, future, error)
            return True
        if resource is None:
            return False
        with self._lock:
            del self._builds[key]
            entry = self._insert(key, resource)
        future.set_result(entry)
        self._sweep()
        return True

    def _fail(self, key: K, future: Future[CacheEntry[V]], error: BaseException) -> None:
        with self._lock:
            del self._builds[key]
        future.set_exception(error)

    def _wait_for_own_build(
        self, future: Future[CacheEntry[V]], check: Callable[[], None]
    ) -> CacheEntry[V]:
        """Return the entry that this thread's build made. The thread is its user already."""
        try:
            return _wait_for_build(future, check)
        except BaseException:
            # the build goes on, since others may wait for it
            future.add_done_callback(self._release_abandoned)
            raise

    def _release_abandoned(self, future: Future[CacheEntry[V]]) -> None:
        if future.exception() is None:
            self._release(future.result())

    def _insert(self, key: K, resource: Resource[V]) -> CacheEntry[V]:
        entry = CacheEntry(resource, self._garbage.append)
        entry.acquire()
        self._entries[key] = entry
        self._size_bytes += resource.size_bytes
        while self._entries and (self._closed or self._size_bytes > self._limit_bytes):
            self._retire(*next(iter(self._entries.items())))
            self._evictions_count += not self._closed
        return entry

    def _release(self, entry: CacheEntry[V]) -> None:
        with self._lock:
            entry.release()
        self._sweep()

    def _retire(self, key: K, entry: CacheEntry[V]) -> None:
        del self._entries[key]
        self._size_bytes -= entry.resource.size_bytes
        entry.retire()

    def _sweep(self) -> None:
        """Free, without the lock, what was retired under it."""
        with self._lock:
            garbage = self._garbage[:]
            self._garbage.clear()
        for resource in garbage:
            resource.free()


def _wait_for_build(build: Future[CacheEntry[V]], check: Callable[[], None]) -> CacheEntry[V]:
    """Return the entry that a build makes, once it is done.

    Raises:
        BaseException: What the build raised, or `check`.
    """
    while True:
        check()
        try:
            return build.result(_POLL_PERIOD_S)
        except TimeoutError:
            if build.done():  # then the build itself may have raised TimeoutError
                return build.result()
