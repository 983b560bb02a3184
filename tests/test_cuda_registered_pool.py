"""A pool of registered memory, with a CUDA that only takes notes."""

from __future__ import annotations

import gc
import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.host_memory import RegisteredMemory
from deconvd_server.device.cuda.api.registered_pool import (
    SMALLEST_REGISTERED_BYTES,
    RegisteredPool,
    size_class,
)
from tests.processes import wait_until

MIB = 1 << 20
LIMIT_BYTES = 16 * MIB


class FakeCuda:
    """What is registered now, by address, as CUDA would know it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.registrations_count = 0
        self.unregistering_threads: set[str] = set()
        self.refuses = False
        self.memory = RegisteredMemory(self._register, self._unregister)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        return self.memory.register(address, size_bytes)

    def _register(self, address: int, size_bytes: int) -> None:
        if self.refuses:
            raise RuntimeError("out of luck")
        assert address % mmap.PAGESIZE == size_bytes % mmap.PAGESIZE == 0
        assert not any(
            begin < address + size_bytes and address < begin + size
            for begin, size in self.registered.items()
        )
        self.registrations_count += 1
        self.registered[address] = size_bytes

    def _unregister(self, address: int) -> None:
        self.unregistering_threads.add(threading.current_thread().name)
        del self.registered[address]

    @property
    def registered_bytes(self) -> int:
        return sum([*self.registered.values()])


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def pool(cuda: FakeCuda) -> Iterator[RegisteredPool]:
    """A pool that must leave nothing registered."""
    made = RegisteredPool(LIMIT_BYTES)
    made.open()
    yield made
    made.close()
    assert cuda.registered == {}


def bytes_spec(size_bytes: int) -> TensorSpec:
    return TensorSpec((size_bytes,), np.dtype(np.uint8))


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_an_array_is_as_messages_have_it_and_cards_reach_it(
    cuda: FakeCuda, pool: RegisteredPool, dtype: DType
) -> None:
    for is_lasting in (False, True):
        array = pool.empty(
            TensorSpec((3, 5, 331, 101), dtype), cuda.register, is_lasting=is_lasting
        )
        array[...] = 1
        assert (array.shape, array.dtype) == ((3, 5, 331, 101), dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert cuda.memory.holds(array)


def test_small_arrays_and_those_beyond_the_limit_are_plain_memory(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    for size_bytes in (0, 1, SMALLEST_REGISTERED_BYTES - 1, LIMIT_BYTES + 1):
        array = pool.empty(bytes_spec(size_bytes), cuda.register)
        assert array.nbytes == size_bytes
        assert not cuda.memory.holds(array)
    assert cuda.registrations_count == 0
    assert cuda.memory.holds(pool.empty(bytes_spec(SMALLEST_REGISTERED_BYTES), cuda.register))
    assert cuda.memory.holds(pool.empty(bytes_spec(LIMIT_BYTES), cuda.register))


def test_memory_is_used_again_once_no_view_of_it_is_left(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    array = pool.empty(bytes_spec(5 * MIB), cuda.register)
    address = array.ctypes.data
    view = array[7:].data
    del array
    gc.collect()
    assert pool.idle_bytes == 0
    assert pool.empty(bytes_spec(5 * MIB), cuda.register).ctypes.data != address

    del view
    assert pool.idle_bytes == 2 * 5 * MIB
    assert pool.empty(bytes_spec(5 * MIB), cuda.register).ctypes.data == address
    assert cuda.registrations_count == 2


def test_sizes_that_were_never_seen_find_buffers_that_are_warm(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    for size_bytes in range(4 * MIB, 8 * MIB, 4097):
        pool.empty(bytes_spec(size_bytes), cuda.register)[...] = 1
    assert cuda.registrations_count == 9
    state = pool.cache_state
    assert (state.count, state.size_bytes, state.limit_bytes) == (
        2,
        16 * MIB - MIB // 2,
        LIMIT_BYTES,
    )
    assert state.hits_count == len(range(4 * MIB, 8 * MIB, 4097)) - 9
    assert state.misses_count == 9


def test_a_buffer_is_at_most_an_eighth_larger_than_its_array() -> None:
    for size_bytes in range(SMALLEST_REGISTERED_BYTES, 20 * MIB, 9973):
        rounded = size_class(size_bytes)
        assert size_bytes <= rounded <= size_bytes * 9 / 8 + mmap.PAGESIZE
        assert rounded % mmap.PAGESIZE == 0
        assert size_class(rounded) == rounded


def test_what_has_been_idle_for_longest_goes_first_and_another_thread_unregisters_it(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    addresses = []
    for size_bytes in (6 * MIB, 7 * MIB, 8 * MIB):
        array = pool.empty(bytes_spec(size_bytes), cuda.register)
        addresses.append(array.ctypes.data)
        del array

    assert pool.idle_bytes == 15 * MIB
    wait_until(lambda: [*cuda.registered] == addresses[1:])
    assert cuda.unregistering_threads == {"registered-memory"}
    assert pool.empty(bytes_spec(7 * MIB), cuda.register).ctypes.data == addresses[1]


def test_twenty_thousand_sizes_leave_no_more_than_the_limit(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    random = np.random.default_rng(0)
    for size_bytes in random.integers(SMALLEST_REGISTERED_BYTES, MIB, 20_000):
        pool.empty(bytes_spec(int(size_bytes)), cuda.register)
        assert pool.idle_bytes <= LIMIT_BYTES
    wait_until(lambda: cuda.registered_bytes == pool.idle_bytes)
    assert pool.registered_bytes == pool.idle_bytes
    assert cuda.registrations_count <= 17


def test_a_lasting_array_takes_its_size_and_leaves_nothing(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    size_bytes = LIMIT_BYTES + MIB + 1
    array = pool.empty(bytes_spec(size_bytes), cuda.register, is_lasting=True)
    assert cuda.memory.holds(array)
    assert size_bytes <= cuda.registered_bytes < size_bytes + mmap.PAGESIZE
    del array
    wait_until(lambda: not cuda.registered)
    assert pool.registered_bytes == pool.idle_bytes == 0


def test_memory_that_cuda_refuses_is_plain_and_told_of_once(
    cuda: FakeCuda, pool: RegisteredPool, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses = True
    with caplog.at_level(logging.WARNING):
        arrays = [pool.empty(bytes_spec(MIB), cuda.register) for _ in range(3)]
    for number, array in enumerate(arrays):
        array[...] = number
        assert not cuda.memory.holds(array)
    assert [array.max() for array in arrays] == [0, 1, 2]
    (record,) = caplog.records
    assert "out of luck" in record.getMessage()


def test_the_last_user_that_closes_unregisters_what_arrays_still_have(cuda: FakeCuda) -> None:
    pool = RegisteredPool(LIMIT_BYTES)
    pool.open()
    pool.open()
    array = pool.empty(bytes_spec(MIB), cuda.register)
    array[...] = 7
    pool.empty(bytes_spec(2 * MIB), cuda.register)

    pool.close()
    assert cuda.memory.holds(array)
    pool.close()

    assert cuda.registered == {}
    assert (array == 7).all()
    del array
    assert pool.idle_bytes == pool.registered_bytes == 0
    pool.open()
    assert cuda.memory.holds(pool.empty(bytes_spec(MIB), cuda.register))
    pool.close()
    assert cuda.registered == {}


def test_memory_that_the_system_does_not_have_is_refused(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    for is_lasting in (False, True):
        with pytest.raises(ExhaustedError, match="no memory left for an array of"):
            pool.empty(bytes_spec(1 << 60), cuda.register, is_lasting=is_lasting)


def test_a_card_that_is_lost_does_not_keep_the_memory_of_others(
    cuda: FakeCuda, pool: RegisteredPool, caplog: pytest.LogCaptureFixture
) -> None:
    def register_lost(_address: int, _size_bytes: int) -> Callable[[], None]:
        def unregister() -> None:
            raise RuntimeError("the card is lost")

        return unregister

    pool.empty(bytes_spec(MIB), register_lost, is_lasting=True)
    pool.empty(bytes_spec(MIB), cuda.register, is_lasting=True)
    wait_until(lambda: pool.registered_bytes == 0)
    assert "the card is lost" in caplog.text


def test_threads_never_share_memory(cuda: FakeCuda, pool: RegisteredPool) -> None:
    def work(thread: int) -> None:
        kept: list[Array] = []
        for step in range(300):
            array = pool.empty(bytes_spec(MIB * (1 + (thread + step) % 4)), cuda.register)
            array[:: mmap.PAGESIZE] = thread
            kept.append(array)
            if len(kept) > 3:
                assert (kept.pop(0)[:: mmap.PAGESIZE] == thread).all()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, thread) for thread in range(8)]:
            done.result()
    assert pool.idle_bytes <= LIMIT_BYTES
    wait_until(lambda: cuda.registered_bytes == pool.idle_bytes)


def test_an_array_may_be_collected_while_the_pool_allocates(
    cuda: FakeCuda, pool: RegisteredPool
) -> None:
    """The collector runs in the middle of `empty`, in the same thread."""
    registering = cuda.memory.register

    def register_while_one_is_collected(address: int, size_bytes: int) -> Callable[[], None]:
        cycle: list[object] = [pool.empty(bytes_spec(6 * MIB), registering)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return registering(address, size_bytes)

    arrays = [pool.empty(bytes_spec(5 * MIB), register_while_one_is_collected) for _ in range(4)]
    assert len({array.ctypes.data for array in arrays}) == 4
    assert pool.idle_bytes == 6 * MIB
