"""The cache: one build a key, bounded, freed exactly once after the last user."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from deconvd_server.resources.cache import Cache, CacheEntry, EntryState, Resource

StrCache = Cache[str, str]


class Maker:
    """Builds resources and notes which were built and freed, in order."""

    def __init__(self, size_bytes: int = 1) -> None:
        self.size_bytes = size_bytes
        self.built: list[str] = []
        self.freed: list[str] = []

    def of(self, key: str) -> Callable[[], Resource[str]]:
        def build() -> Resource[str]:
            self.built.append(key)
            return Resource(key.upper(), self.size_bytes, lambda: self.freed.append(key))

        return build


def use(cache: Cache[str, str], maker: Maker, key: str) -> str:
    with cache.lease(key, maker.of(key)) as value:
        return value


def test_a_second_lease_gives_what_the_first_built() -> None:
    cache, maker = StrCache(10), Maker()

    assert use(cache, maker, "a") == use(cache, maker, "a") == "A"
    assert maker.built == ["a"]
    assert (cache.stats.hits_count, cache.stats.misses_count) == (1, 1)


def test_the_least_recently_used_is_freed_first() -> None:
    cache, maker = StrCache(2), Maker()
    for key in "aba":
        use(cache, maker, key)

    use(cache, maker, "c")

    assert maker.freed == ["b"]
    assert (cache.stats.count, cache.stats.size_bytes) == (2, 2)


def test_only_what_makes_room_for_others_counts_as_evicted() -> None:
    cache, maker = StrCache(2), Maker()
    for key in "abcd":
        use(cache, maker, key)

    cache.drop("d")
    cache.close()
    use(cache, maker, "e")  # which is freed at once

    assert maker.freed == ["a", "b", "d", "c", "e"]
    assert cache.stats.evictions_count == 2


def test_a_resource_in_use_is_freed_after_its_last_user() -> None:
    cache, maker = StrCache(10), Maker()
    with cache.lease("a", maker.of("a")):
        with cache.lease("a", maker.of("a")):
            cache.drop("a")
            assert maker.freed == []
        assert maker.freed == []
    assert maker.freed == ["a"]


def test_a_dropped_key_is_built_anew_while_the_old_resource_is_in_use() -> None:
    cache, maker = StrCache(10), Maker()
    with cache.lease("a", maker.of("a")):
        cache.drop("a")
        use(cache, maker, "a")
    assert (maker.built, maker.freed) == (["a", "a"], ["a"])


def test_a_resource_above_the_limit_serves_its_user_and_is_freed() -> None:
    cache, maker = StrCache(3), Maker(size_bytes=4)

    assert use(cache, maker, "a") == "A"

    assert maker.freed == ["a"]
    assert cache.stats.size_bytes == 0


def test_close_frees_all_and_what_is_built_later_is_not_kept() -> None:
    cache, maker = StrCache(10), Maker()
    use(cache, maker, "a")
    cache.close()
    use(cache, maker, "b")
    assert maker.freed == ["a", "b"]


def test_threads_that_miss_together_share_one_build() -> None:
    cache, started, finish = StrCache(10), threading.Event(), threading.Event()
    built = []

    def build() -> Resource[str]:
        built.append(1)
        started.set()
        assert finish.wait(10)
        return Resource("value", 1)

    def lease() -> str:
        with cache.lease("a", build) as value:
            return value

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(lease) for _ in range(8)]
        assert started.wait(10)
        finish.set()
        assert [future.result() for future in futures] == ["value"] * 8
    assert built == [1]


def test_a_failed_build_is_raised_to_all_who_wait_and_is_tried_again() -> None:
    cache, finish = StrCache(10), threading.Event()
    waiting = threading.Barrier(3)

    def fail() -> Resource[str]:
        assert finish.wait(10)
        raise TimeoutError("no such engine")

    def lease() -> None:
        waiting.wait(10)
        with cache.lease("a", fail):
            pass

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lease) for _ in range(2)]
        waiting.wait(10)
        finish.set()
        for future in futures:
            with pytest.raises(TimeoutError, match="no such engine"):
                future.result(10)
    assert use(cache, Maker(), "a") == "A"


def test_one_who_waits_gives_up_when_its_check_raises() -> None:
    cache, started, finish = StrCache(10), threading.Event(), threading.Event()

    def build() -> Resource[str]:
        started.set()
        assert finish.wait(10)
        return Resource("value", 1)

    def check() -> None:
        raise InterruptedError("the caller has gone")

    def lease() -> str:
        with cache.lease("a", build) as value:
            return value

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lease)
        assert started.wait(10)
        with pytest.raises(InterruptedError), cache.lease("a", build, check=check):
            pass
        finish.set()
        assert future.result(10) == "value"


def test_one_who_gives_up_its_own_build_leaves_it_to_others() -> None:
    cache, finish = StrCache(10), threading.Event()
    maker, checks = Maker(), iter([None, InterruptedError("the deadline has passed")])

    def build() -> Resource[str]:
        assert finish.wait(10)
        return maker.of("a")()

    def check() -> None:
        error = next(checks)
        if error is not None:
            raise error

    with ThreadPoolExecutor(1) as pool:
        with (
            pytest.raises(InterruptedError),
            cache.lease("a", build, check=check, executor=pool),
        ):
            pass
        finish.set()
        with cache.lease("a", build, executor=pool) as value:
            assert value == "A"
    cache.close()
    assert (maker.built, maker.freed) == (["a"], ["a"])


def test_an_executor_that_was_shut_down_builds_nothing() -> None:
    cache, pool = StrCache(10), ThreadPoolExecutor(1)
    pool.shutdown()
    with (
        pytest.raises(RuntimeError, match="shutdown"),
        cache.lease("a", Maker().of("a"), executor=pool),
    ):
        pass
    assert use(cache, Maker(), "a") == "A"


def test_many_threads_free_everything_exactly_once() -> None:
    cache: Cache[int, int] = Cache(3)
    lock = threading.Lock()
    built: list[int] = []
    freed: list[int] = []

    def build() -> Resource[int]:
        with lock:
            number = len(built)
            built.append(number)
        return Resource(number, 1, lambda: freed.append(number))

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(300):
            with cache.lease(random.randrange(6), build) as number:
                assert number not in freed
                if random.random() < 0.1:
                    cache.drop(random.randrange(6))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    cache.close()
    assert sorted(freed) == built


def test_an_entry_takes_no_users_once_retired_and_is_freed_once() -> None:
    freed: list[Resource[str]] = []
    entry = CacheEntry(Resource("value", 1), freed.append)
    entry.acquire()
    entry.retire()
    entry.retire()
    with pytest.raises(RuntimeError, match="retired"):
        entry.acquire()
    entry.release()
    with pytest.raises(RuntimeError, match="more often"):
        entry.release()
    assert entry.state is EntryState.FREED
    assert [resource.value for resource in freed] == ["value"]
