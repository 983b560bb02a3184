"""Copies by several threads are copies."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import pytest

from deconvd.host import parallel_copy
from deconvd.host.parallel_copy import copy_all, copy_into
from tests.interrupts import interrupt_everywhere
from tests.processes import exit_code, wait_until

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


@pytest.mark.parametrize("processors_count", [1, 2, 8])
def test_an_error_of_whoever_is_told_ends_the_copy(
    monkeypatch: pytest.MonkeyPatch, processors_count: int
) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: processors_count)
    target, source = np.zeros(64 * _MIB, np.float32), np.ones(64 * _MIB, np.float32)
    told: list[int] = []

    def tell(size_bytes: int) -> None:
        told.append(size_bytes)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copy_all([(target, source)], tell)

    assert told[0] < target.nbytes
    assert not target[-_MIB:].any()


@pytest.mark.parametrize("processors_count", [1, 8])
def test_several_arrays_are_copied_at_once(
    monkeypatch: pytest.MonkeyPatch, processors_count: int
) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: processors_count)
    random = np.random.default_rng(0)
    shapes = (3, 700, 999), (), (2 * _MIB,), (0, 5), (4, 9999, 33)
    sources = [random.random(shape, np.float32) for shape in shapes]
    sources[0] = sources[0].T
    sources[2] = sources[2].astype(">f4")
    targets = [np.empty(source.shape, np.float32) for source in sources]

    copy_all([*zip(targets, sources, strict=True)])

    for target, source in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(target, source)
    copy_all([])


@pytest.mark.parametrize("processors_count", [1, 8])
@pytest.mark.parametrize(
    "shape",
    [(), (0, 3), (1000,), (5 * _MIB,), (40, 3, 333, 99), (3, 1, 2 * _MIB + 7), (1, 9999, 700)],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_told_of_is_there(
    monkeypatch: pytest.MonkeyPatch, processors_count: int, shape: tuple[int, ...], order: str
) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: processors_count)
    source = np.random.default_rng(0).random(shape, np.float32)
    source = np.asfortranarray(source) if order == "F" else source
    target = np.full(shape, -1, np.float32)
    told: list[int] = []

    def check(done_bytes: int) -> None:
        told.append(done_bytes)
        count = done_bytes // 4
        np.testing.assert_array_equal(target.ravel()[:count], source.ravel()[:count])

    copy_all([(target, source)], check)

    assert told == sorted(set(told))
    assert told[-1] == target.nbytes


@pytest.mark.parametrize("processors_count", [1, 8])
def test_what_is_told_of_several_is_there(
    monkeypatch: pytest.MonkeyPatch, processors_count: int
) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: processors_count)
    random = np.random.default_rng(0)
    sources = [random.random(count, np.float32) for count in (3 * _MIB, 5, 0, 4 * _MIB + 7)]
    targets = [np.full(source.shape, -1, np.float32) for source in sources]
    told: list[int] = []

    def check(done_bytes: int) -> None:
        told.append(done_bytes)
        count = done_bytes // 4
        there, wanted = (np.concatenate(arrays)[:count] for arrays in (targets, sources))
        np.testing.assert_array_equal(there, wanted)

    copy_all([*zip(targets, sources, strict=True)], check)

    assert told == sorted(set(told))
    assert told[-1] == sum(source.nbytes for source in sources)


def test_others_copy_while_one_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 2)
    source = np.random.default_rng(0).random(8 * _MIB, np.float32)
    target = np.full(source.shape, -1, np.float32)
    told: list[int] = []

    def wait_for_the_rest(done_bytes: int) -> None:
        told.append(done_bytes)
        wait_until(lambda: np.array_equal(target, source))

    copy_all([(target, source)], wait_for_the_rest)

    assert told[-1] == source.nbytes


def test_of_much_more_than_caches_hold_more_threads_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    threads_counts: list[int] = []
    helpers = parallel_copy._copy_threads

    class Counting:
        def help(self, copy: parallel_copy._CopyJob, count: int) -> None:
            threads_counts.append(count + 1)
            helpers.help(copy, count)

    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 16)
    monkeypatch.setattr(parallel_copy, "_copy_threads", Counting())
    for size_bytes in (64 * _MIB, 256 * _MIB):
        target = np.zeros(size_bytes, np.uint8)
        copy_into(target, np.ones(size_bytes, np.uint8))
        assert target.all()
    assert threads_counts == [4, 8]


def test_an_interrupted_copy_touches_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 8)
    source, target = np.ones(64 * _MIB, np.float32), np.zeros(64 * _MIB, np.float32)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_all([(target, source)], interrupt)

    target[:] = 0
    time.sleep(0.05)  # a thread that went on would write meanwhile
    assert not target.any()


def test_a_copy_touches_nothing_any_more_wherever_an_interrupt_strikes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 4)
    source, target = np.ones(3 * _MIB, np.float32), np.zeros(3 * _MIB, np.float32)
    for _ in interrupt_everywhere(lambda: copy_into(target, source)):
        target[:] = 0
        time.sleep(0.002)  # likewise
        assert not target.any()
        copy_into(target, source)
        assert target.all()


def test_nobody_holds_the_arrays_of_a_copy_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is to be used again at once, however late a thread wakes that was to help."""
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 8)
    with monkeypatch.context() as asleep:
        asleep.setattr(
            parallel_copy._copy_threads, "_queue", SimpleQueue()
        )  # of threads that never wake
        source, target = np.ones(8 * _MIB, np.float32), np.zeros(8 * _MIB, np.float32)
        told: list[int] = []
        copy_all([(target, source)], told.append)
        assert told[-1] == target.nbytes
        assert parallel_copy._copy_threads._queue.qsize() > 0
        alive = [weakref.ref(array) for array in (source, target)]
        del source, target
        assert [array() for array in alive] == [None, None]


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

    def copy_again() -> bool:
        target[:] = 0
        copy_into(target, source)
        return bool(target.all())

    assert exit_code(copy_again) == 0
