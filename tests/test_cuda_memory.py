"""Blocks of the card's memory, with an allocator that needs no card."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deconvd.errors import CallCancelledError, DeadlineError, ExhaustedError
from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda.api.memory import ALIGNMENT_BYTES, BlockLayout, DeviceMemory


class Block:
    def __init__(self, card: Card, size_bytes: int) -> None:
        self.ptr = 4096
        self._card, self._size_bytes = card, size_bytes
        card.used_bytes += size_bytes

    def __del__(self) -> None:
        self._card.used_bytes -= self._size_bytes


class Card:
    """An allocator that fails beyond its capacity."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    def allocate(self, size_bytes: int) -> Block:
        if self.used_bytes + size_bytes > self.capacity_bytes:
            raise MemoryError(f"out of memory allocating {size_bytes} bytes")
        return Block(self, size_bytes)


def memory_of(allocate: Callable[[int], Any]) -> DeviceMemory:
    return DeviceMemory(100, allocate, allocate_resident=allocate, allocate_shared=allocate)


def test_what_stays_and_what_others_see_have_allocators_of_their_own() -> None:
    calls, stays, lent = (Card(100) for _ in range(3))
    memory = DeviceMemory(
        100, calls.allocate, allocate_resident=stays.allocate, allocate_shared=lent.allocate
    )
    leases = memory.lease_resident(20), memory.lease_shared(30)
    with memory.lease(10):
        assert (calls.used_bytes, stays.used_bytes, lent.used_bytes) == (10, 20, 30)
    for lease in leases:
        lease.free()
    assert memory.stats.used_bytes == 0


def test_a_block_is_given_back_at_the_end_of_its_block() -> None:
    card = Card(100)
    memory = memory_of(card.allocate)
    with memory.lease(60) as pointer, memory.lease(40):
        assert pointer == 4096
        assert memory.stats.used_bytes == card.used_bytes == 100
    assert memory.stats.used_bytes == card.used_bytes == 0
    assert (memory.stats.peak_bytes, memory.stats.leased_count) == (100, 2)


def test_what_exceeds_the_limit_is_refused_before_anything_is_allocated() -> None:
    card = Card(1000)
    memory = memory_of(card.allocate)
    with memory.lease(60):
        with (
            pytest.raises(ExhaustedError, match=r"41 bytes.* 40 of 100 are free"),
            memory.lease(41),
        ):
            pass
        assert card.used_bytes == 60
        assert memory.stats.refused_count == 1
        with memory.lease(40):
            pass


def test_a_card_without_memory_fails_that_call_alone() -> None:
    card = Card(50)
    memory = memory_of(card.allocate)
    with pytest.raises(ExhaustedError, match="out of memory allocating 60"), memory.lease(60):
        pass
    with memory.lease(50):
        assert memory.stats.used_bytes == 50


def test_a_call_that_fails_gives_its_block_back() -> None:
    card = Card(100)
    memory = memory_of(card.allocate)
    with pytest.raises(KeyError), memory.lease(60):
        raise KeyError("the call failed")
    assert memory.stats.used_bytes == card.used_bytes == 0


def test_threads_never_take_more_than_the_limit() -> None:
    lock, taken, most = threading.Lock(), 0, 0

    class Counted:
        ptr = 0

    memory = memory_of(lambda _: Counted())

    def work(thread: int) -> int:
        nonlocal taken, most
        refused = 0
        for i in range(300):
            size_bytes = (thread * 31 + i * 17) % 60 + 1
            try:
                with memory.lease(size_bytes):
                    with lock:
                        taken += size_bytes
                        most = max(most, taken)
                    with lock:
                        taken -= size_bytes
            except ExhaustedError:
                refused += 1
        return refused

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert most <= 100
    assert memory.stats.used_bytes == 0


def test_regions_are_aligned_and_do_not_overlap() -> None:
    regions = BlockLayout()
    parts = [regions.add(size_bytes) for size_bytes in (1, 0, 256, 257, 1000)]
    ends = [part.offset + part.size_bytes for part in parts]
    assert all(part.offset % ALIGNMENT_BYTES == 0 for part in parts)
    assert all(end <= part.offset for end, part in zip(ends, parts[1:], strict=False))
    assert ends[-1] <= regions.total_bytes


def test_a_call_waits_for_the_memory_of_a_search_and_for_no_other() -> None:
    memory = memory_of(Card(100).allocate)
    search = memory.lease_for_search(60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(memory.lease, 50)
        with pytest.raises(ExhaustedError, match=r"60 bytes .* are needed, 40 of 100 are free"):
            memory.lease_for_search(60)
        assert not waiting.done()
        search.free()
        call = waiting.result(60)
    with pytest.raises(ExhaustedError, match="50 of 100 are free"):
        memory.lease(60)
    call.free()
    assert memory.stats.used_bytes == 0


def test_a_call_waits_for_no_search_once_it_is_cancelled_or_late() -> None:
    memory = memory_of(Card(100).allocate)
    cancelled, late = CallContext(), CallContext(timeout_s=0.05)
    with memory.lease_for_search(60), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(memory.lease, 50, call.check) for call in (cancelled, late)]
        with pytest.raises(DeadlineError):
            waiting[1].result(60)
        assert not waiting[0].done()
        cancelled.cancel()
        with pytest.raises(CallCancelledError):
            waiting[0].result(60)
        memory.lease_for_search(30).free()  # which nobody is before
    assert memory.stats.used_bytes == 0


def test_what_does_not_fit_after_a_search_either_is_refused_at_once() -> None:
    memory = memory_of(Card(100).allocate)
    with memory.lease_resident(50), memory.lease_for_search(30):
        with pytest.raises(ExhaustedError, match=r"60 bytes .* are needed, 20 of 100 are free"):
            memory.lease(60)
        with memory.lease(20):
            pass


def test_searches_that_follow_each_other_leave_room_for_a_call() -> None:
    memory = memory_of(Card(100).allocate)
    begun, is_over = (threading.Event(), threading.Event()), threading.Event()

    def search_again_and_again(own: threading.Event, other: threading.Event) -> None:
        while not is_over.is_set():
            with memory.lease_for_search(40):
                own.set()
                other.wait(0.05)  # so that there is always one
                other.clear()

    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search_again_and_again, *pair) for pair in (begun, begun[::-1])]
        try:
            for event in begun:
                assert event.wait(60)
            pool.submit(lambda: memory.lease(70).free()).result(60)
        finally:
            is_over.set()
        for search in searches:
            search.result(60)
    assert memory.stats.used_bytes == 0
