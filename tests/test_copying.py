"""Copies by several threads are copies."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deconvd.copying import copy_into

_MIB = 1 << 20


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (1000,), (5 * _MIB,), (3, 1, 2 * _MIB + 7), (7, 1, 2, 333, 999)]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_copy_has_the_elements_of_its_source(shape: tuple[int, ...], order: str) -> None:
    source = np.random.default_rng(0).random(shape, np.float32)
    source = np.asfortranarray(source) if order == "F" else source
    target = np.empty(shape, np.float32)

    copy_into(target, source)

    np.testing.assert_array_equal(target, source)


def test_byte_order_and_strides_of_the_source_may_be_any() -> None:
    source = np.arange(8 * _MIB, dtype=">f4").reshape(4, -1)[:, ::-2]
    target = np.empty(source.shape, np.float32)

    copy_into(target, source)

    np.testing.assert_array_equal(target, source)


def test_threads_may_copy_at_once() -> None:
    sources = [np.full(4 * _MIB, number, np.float32) for number in range(8)]
    targets = [np.empty_like(source) for source in sources]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(copy_into, targets, sources))

    assert (
        [target.min() for target in targets]
        == [target.max() for target in targets]
        == list(range(8))
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_copies_with_threads_of_its_own() -> None:
    source, target = np.ones(8 * _MIB, np.float32), np.zeros(8 * _MIB, np.float32)
    copy_into(target, source)
    child = os.fork()
    if child == 0:
        target[:] = 0
        copy_into(target, source)
        os._exit(0 if target.all() else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
