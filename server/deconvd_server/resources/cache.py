"""A cache of resources that are costly to build and must be freed, such as plans."""

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
"""How often one who waits for another's build looks whether its own call is still wanted."""


class EntryState(StrEnum):
    """What has become of an entry."""

    LIVE = "live"
    RETIRED = "retired"
    FREED = "freed"


@dataclass(frozen=True, slots=True)
class Resource(Generic[V]):
    """What a build gives.

    Attributes:
        value: What users get.
        size_bytes: What it counts for against the cache's limit.
        free: Called once, after the last user; must not raise.
    """

    value: V
    size_bytes: int
    free: Callable[[], None] = lambda: None


class CacheEntry(Generic[V]):
    """One resource, shared by its users, freed after the last of them.

        LIVE --retire--> RETIRED --last release--> FREED

    A retired entry keeps the users it has and takes no new ones. Not thread-safe: its cache calls
    it under one lock.

    Args:
        free: Called with the resource once it is to be freed.
    """

    def __init__(self, resource: Resource[V], free: Callable[[Resource[V]], None]) -> None:
        self.resource = resource
        self.state = EntryState.LIVE
        self._free = free
        self._users = 0

    @property
    def users_count(self) -> int:
        """How many use it now."""
        return self._users

    def acquire(self) -> None:
        """Add a user."""
        if self.state is not EntryState.LIVE:
            raise RuntimeError(f"cannot acquire a {self.state.value} entry")
        self._users += 1

    def release(self) -> None:
        """Remove a user."""
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
    """What a cache holds, and how often it could help.

    Attributes:
        count: Resources that are live.
        size_bytes: What they count for, together.
        hits_count: Leases of a resource that was there.
        misses_count: Leases that had to build, or to wait for another's build.
    """

    count: int
    size_bytes: int
    hits_count: int
    misses_count: int


class Cache(Generic[K, V]):
    """Resources by key, bounded in bytes: the least recently used are retired first.

    A key is built once however many ask for it at the same time. There is no way to ask whether a
    key is there, since the answer would be old when it is given. Thread-safe; resources are built
    and freed outside its lock.

    Args:
        limit_bytes: What live resources may count for together. One that is larger than this alone
            serves those who lease it now and is freed after them.
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
        self._closed = False

    @contextmanager
    def lease(
        self,
        key: K,
        build: Callable[[], Resource[V]],
        *,
        check: Callable[[], None] = lambda: None,
        executor: Executor | None = None,
    ) -> Iterator[V]:
        """Lend the resource of `key` for the length of a with-block.

        Args:
            build: Makes it, if it is not there. What it raises is raised to all who wait for it,
                and is not remembered.
            check: Called now and then while a build is waited for; what it raises ends the wait.
            executor: Where to build; by default in this thread, which then cannot give up.
        """
        entry = self._acquire(key, build, check, executor)
        try:
            yield entry.resource.value
        finally:
            self._release(entry)

    def drop(self, key: K) -> None:
        """Retire the resource of `key`, if there is one."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._retire(key, entry)
        self._sweep()

    def close(self) -> None:
        """Retire all, and keep nothing from now on."""
        with self._lock:
            self._closed = True
            for key, entry in list(self._entries.items()):
                self._retire(key, entry)
        self._sweep()

    @property
    def stats(self) -> CacheStats:
        """What it holds now."""
        with self._lock:
            return CacheStats(
                len(self._entries), self._size_bytes, self._hits_count, self._misses_count
            )

    def _acquire(
        self,
        key: K,
        build: Callable[[], Resource[V]],
        check: Callable[[], None],
        executor: Executor | None,
    ) -> CacheEntry[V]:
        missed = False
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    return self._acquire_live(key, entry, missed=missed)
                self._misses_count += not missed
                missed = True
                theirs = self._builds.get(key)
                if theirs is None:
                    mine = self._builds[key] = Future[CacheEntry[V]]()
            if theirs is None:
                self._start(key, build, mine, executor)
                return self._wait_for_own_build(mine, check)
            _wait_for_build(theirs, check)

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
        except RuntimeError as error:  # it was shut down, or cannot start a thread now
            self._fail(key, future, error)

    def _build(
        self, key: K, build: Callable[[], Resource[V]], future: Future[CacheEntry[V]]
    ) -> None:
        if future.done():  # it was queued all the same when the executor could start no thread
            return
        try:
            resource = build()
        except BaseException as error:  # noqa: BLE001 - whatever it is, each that waits for the build gets it
            self._fail(key, future, error)
            return
        with self._lock:
            del self._builds[key]
            entry = self._insert(key, resource)
        future.set_result(entry)
        self._sweep()

    def _fail(self, key: K, future: Future[CacheEntry[V]], error: BaseException) -> None:
        with self._lock:
            del self._builds[key]
        future.set_exception(error)

    def _wait_for_own_build(
        self, future: Future[CacheEntry[V]], check: Callable[[], None]
    ) -> CacheEntry[V]:
        """Return the entry of one's own build, which has one as its user already."""
        try:
            return _wait_for_build(future, check)
        except BaseException:
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
        """Free, outside the lock, what was given up under it."""
        with self._lock:
            garbage = self._garbage[:]
            self._garbage.clear()
        for resource in garbage:
            resource.free()


def _wait_for_build(build: Future[CacheEntry[V]], check: Callable[[], None]) -> CacheEntry[V]:
    """Return what a build gives, once it is done.

    Raises:
        BaseException: What the build raised, or `check`.
    """
    while True:
        check()
        try:
            return build.result(_POLL_PERIOD_S)
        except TimeoutError:
            if build.done():  # then the error may be the build's own
                return build.result()
