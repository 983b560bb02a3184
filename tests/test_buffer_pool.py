"""Memory of results: new arrays for the caller, old pages for the machine."""

from __future__ import annotations

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deconvd.host import buffer_pool
from deconvd.host.buffer_pool import BufferPool
from deconvd.model.dtypes import ELEMENT_TYPES, DType
from deconvd.model.problem import TensorSpec
from tests.interrupts import interrupt_everywhere

MEBI = 1 << 20
LARGE = TensorSpec((2, 3, 512, 512), np.dtype(np.float32))


def floats(size_bytes: int, *extents: int) -> TensorSpec:
    return TensorSpec((size_bytes // 4, *extents), np.dtype(np.float32))


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_an_array_is_contiguous_writable_and_of_the_asked_kind(dtype: DType) -> None:
    for shape in ((2, 3, 512, 512), (2, 3)):
        array = BufferPool(1 << 30).empty(TensorSpec(shape, dtype))
        array[...] = 1
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_memory_is_used_again_once_the_array_is_dropped() -> None:
    memory = BufferPool(1 << 30)
    array = memory.empty(LARGE)
    address = array.ctypes.data
    del array

    assert memory.idle_bytes == LARGE.nbytes
    assert memory.empty(LARGE).ctypes.data == address


def test_arrays_of_other_sizes_use_the_smallest_memory_that_is_little_larger() -> None:
    memory = BufferPool(1 << 30, spare_part=1 / 8)
    arrays = [memory.empty(floats(size)) for size in (10 * MEBI, 9 * MEBI, 8 * MEBI)]
    addresses = [array.ctypes.data for array in arrays]
    idle_bytes = sum(array.nbytes for array in arrays)
    arrays.clear()

    array = memory.empty(floats(8 * MEBI + 4, 1))
    array[...] = 3
    pickled = pickle.dumps(array)
    other = memory.empty(floats(7 * MEBI))

    assert array.ctypes.data == addresses[1]
    assert other.ctypes.data not in addresses
    assert array.nbytes == 8 * MEBI + 4
    assert array.base is not None
    assert array.base.nbytes == array.nbytes  # what is behind it is nobody's business
    assert array.flags.writeable
    assert array.flags.aligned
    assert len(pickled) < array.nbytes + 4096
    np.testing.assert_array_equal(pickle.loads(pickled), array)
    assert memory.idle_bytes == idle_bytes - 9 * MEBI
    del array
    assert memory.idle_bytes == idle_bytes


def test_memory_that_nobody_takes_for_long_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = BufferPool(1 << 30)
    arrays = [memory.empty(floats(size)) for size in (MEBI, 2 * MEBI, 3 * MEBI)]
    arrays.pop()
    assert memory.idle_bytes == 3 * MEBI

    monkeypatch.setattr(buffer_pool, "_MAX_IDLE_S", 0.0)
    arrays.pop()

    assert memory.idle_bytes == 2 * MEBI


def test_memory_is_not_used_again_while_a_view_of_it_lives() -> None:
    memory = BufferPool(1 << 30)
    array = memory.empty(LARGE)
    array[...] = 7
    view = array.reshape(-1)[5:].view(np.uint8).data
    del array
    gc.collect()

    memory.empty(LARGE)[...] = 8

    assert memory.idle_bytes == LARGE.nbytes  # of the second array alone
    assert (np.frombuffer(view, np.float32) == 7).all()


def test_no_more_than_the_limit_is_kept() -> None:
    memory = BufferPool(2 * LARGE.nbytes)
    arrays = [memory.empty(LARGE) for _ in range(5)]
    assert memory.idle_bytes == 0
    arrays.clear()
    assert memory.idle_bytes == 2 * LARGE.nbytes
    memory.clear()
    assert memory.idle_bytes == 0


def test_what_is_over_the_limit_is_never_kept() -> None:
    memory = BufferPool(LARGE.nbytes - 1)
    array = memory.empty(LARGE)

    buffer = weakref.ref(array)
    del array

    assert buffer() is None
    assert memory.idle_bytes == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_memory_is_of_use_wherever_an_interrupt_strikes() -> None:
    memory = BufferPool(2 * LARGE.nbytes)
    held = memory.empty(LARGE)
    held[...] = 7

    def use() -> None:
        arrays = [memory.empty(LARGE) for _ in range(4)]
        assert len({array.ctypes.data for array in arrays}) == 4
        for array in arrays:
            array[...] = 8

    for _ in interrupt_everywhere(use):
        array = memory.empty(LARGE)
        array[...] = 9
        address = array.ctypes.data
        del array
        assert memory.empty(LARGE).ctypes.data == address
        assert memory.idle_bytes <= 2 * LARGE.nbytes
    assert (held == 7).all()


def test_threads_never_share_memory() -> None:
    memory = BufferPool(1 << 30)

    def work(thread: int) -> None:
        for _ in range(100):
            array = memory.empty(LARGE)
            array[0, 0, 0] = thread
            assert (array[0, 0, 0] == thread).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
