"""Memory of results: new arrays for the caller, old pages for the machine."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deconvd.host.buffer_pool import BufferPool
from deconvd.model.dtypes import ELEMENT_TYPES, DType
from deconvd.model.problem import TensorSpec
from tests.interrupts import interrupt_everywhere

LARGE = TensorSpec((2, 3, 512, 512), np.dtype(np.float32))


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
