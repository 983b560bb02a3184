"""The borrower: arrays in lent memory live as long as they are held, are found, and are never used twice at once."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    StaleRegionError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.shared_slice import SharedSlice
from deconvd_client.calls.deadline import Deadline
from deconvd_client.shared_memory import Borrower, SharedCall
from deconvd_server.shared_memory import Lender, LoanLimits
from tests.deadlines import short_deadline
from tests.lenders import MIB, lend_tensor, start_borrower_process, start_lender
from tests.processes import leaves_no_descriptor

FLOAT32 = np.dtype(np.float32)
LARGE = TensorSpec((4, MIB), FLOAT32)
TIMEOUT_S = 30


def seen_by(lender: Lender, borrower: Borrower, array: Array) -> Array:
    """What the server finds where the client says that an array lies."""
    place = borrower.locate(array)
    assert place is not None
    with lend_tensor(lender, "x", place, TensorSpec(array.shape, array.dtype)) as found:
        return found.copy()


def failed_call(borrower: Borrower, error: BaseException) -> SharedSlice:
    """Make a call that wants a result and ends with an error; return where the result would have been."""
    try:
        with SharedCall(borrower, short_deadline()) as call:
            message, result = (
                call.operand_message(np.ones(LARGE.shape, FLOAT32)),
                call.allocate_result(LARGE),
            )
            assert message is not None
            assert result is not None
            place = result.shared_slice
            del result
            raise error
    except type(error) as raised:
        assert raised is error  # noqa: PT017  # it passes the borrower as it is
        raised.__traceback__ = None
    return place


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process have no more descriptors than it has, for the block."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def slice_of(message: pb.Tensor) -> SharedSlice:
    return SharedSlice.from_message(message.shared)


def told_slice(line: str) -> SharedSlice:
    region, offset_bytes = line.split()
    return SharedSlice(bytes.fromhex(region), int(offset_bytes))


def cut_off(call: SharedCall, lender: Lender) -> None:
    assert call.operand_message(np.ones(LARGE.shape, FLOAT32)) is not None
    lender.close()
    raise StaleRegionError("x must be in shared memory that this server lends")


def test_memory_is_lent_once_there_are_descriptors_again(lender: Lender, path: Path) -> None:
    borrower = Borrower(lambda _: str(path), is_only_way=True)
    with no_more_descriptors():
        assert borrower.allocate(LARGE.nbytes, short_deadline()) is None
        with pytest.raises(UnavailableError, match="Too many open files"):
            borrower.check_fallback()

    assert borrower.allocate(LARGE.nbytes, short_deadline()) is not None
    borrower.close()
    with pytest.raises(CallCancelledError):
        borrower.check_fallback()


class TestEmpty:
    """Arrays that lie in shared memory from the beginning."""

    @pytest.mark.parametrize(
        "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, "<f4"]
    )
    @pytest.mark.parametrize("shape", [(3, 5), (1,), 7, (), (2, 3, 100, 100), np.int64(4)])
    def test_the_server_sees_what_is_written_to_it(
        self, lender: Lender, borrower: Borrower, shape: int, dtype: np.dtype
    ) -> None:
        array = borrower.empty(shape, dtype, short_deadline())
        array[...] = 5

        assert array.dtype == np.dtype(dtype)
        assert array.shape == np.empty(shape).shape
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(seen_by(lender, borrower, array), array)

    def test_large_arrays_begin_at_pages(self, lender: Lender, borrower: Borrower) -> None:
        small = borrower.empty(3, np.float64, short_deadline())
        large = borrower.empty(MIB, np.float64, short_deadline())

        assert large.ctypes.data % 4096 == 0
        assert not np.shares_memory(small, large)

    def test_an_array_without_elements_is_an_ordinary_one(self, borrower: Borrower) -> None:
        assert borrower.empty((3, 0, 2), np.float32, short_deadline()).shape == (3, 0, 2)

    @pytest.mark.parametrize("dtype", [object, np.int32, np.complex64, "S4"])
    def test_other_element_types_are_refused(self, borrower: Borrower, dtype: type) -> None:
        with pytest.raises(InvalidArgumentError) as raised:
            borrower.empty(3, dtype, short_deadline())
        assert raised.value.argument == "dtype"

    @pytest.mark.parametrize("shape", [-1, (2, -1), (2**40,)])
    def test_shapes_of_no_array_are_refused(self, borrower: Borrower, shape: int) -> None:
        with pytest.raises(InvalidArgumentError) as raised:
            borrower.empty(shape, np.float32, short_deadline())
        assert raised.value.argument == "shape"

    def test_without_a_server_it_is_an_ordinary_array(
        self, borrower: Borrower, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)

        arrays = [borrower.empty((2, 3), np.float32, short_deadline()) for _ in range(3)]

        assert all(array.shape == (2, 3) and array.dtype == FLOAT32 for array in arrays)
        assert [borrower.locate(array) for array in arrays] == [None] * 3
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.INFO
        assert "tensors are sent instead" in caplog.text


class TestLocate:
    """Where an array lies, if a call could name it."""

    def test_views_that_are_contiguous_are_found(self, lender: Lender, borrower: Borrower) -> None:
        x = borrower.empty((4, 3, 8, 8), np.float32, short_deadline())
        x[...] = np.arange(x.size).reshape(x.shape)

        for view in (
            x[1:3],
            x[2],
            x.reshape(12, 64),
            x.ravel(),
            x[3, 2, 7],
            x[0, 0, 0, :3],
            x[:, :],
        ):
            np.testing.assert_array_equal(seen_by(lender, borrower, view), view)

    def test_what_a_message_could_not_say_is_not(self, lender: Lender, borrower: Borrower) -> None:
        x = borrower.empty((4, 3, 8, 8), np.float32, short_deadline())
        odd = x.reshape(-1).view(np.uint8)[1:129].view(np.float32)

        for view in (x[:, 1:], x[..., ::2], x[::-1], x.T, odd, x.view(">f4"), x[:0]):
            assert borrower.locate(view) is None

    def test_arrays_elsewhere_are_not(self, lender: Lender, borrower: Borrower) -> None:
        x = borrower.empty((4, 3), np.float32, short_deadline())

        for other in (x.copy(), x + 1, np.empty(0), np.empty((100, 100))):
            assert borrower.locate(other) is None

    def test_one_borrower_does_not_know_anothers(
        self, lender: Lender, borrower: Borrower, path: Path
    ) -> None:
        other = Borrower(lambda _: str(path))
        assert borrower.locate(other.empty(100, np.float32, short_deadline())) is None
        other.close()

    def test_subclasses_and_read_only_arrays_are_found(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        x = borrower.empty(100, np.float32, short_deadline())
        x.flags.writeable = False

        assert borrower.locate(x) is not None
        assert borrower.locate(x.view(np.recarray)) is not None


class TestLife:
    """An array's memory is its own for as long as any view of it lives, and then serves again."""

    def test_a_view_keeps_the_memory(self, lender: Lender, borrower: Borrower) -> None:
        view = borrower.empty((10, MIB), np.float32, short_deadline())[3].reshape(2, -1)[1][::2]
        view[...] = 3
        others = [borrower.empty(MIB, np.float32, short_deadline()) for _ in range(8)]
        for other in others:
            other[...] = 4

        assert (view == 3).all()
        assert not any(np.shares_memory(view, other) for other in others)

    def test_memory_is_used_again_and_no_more_is_borrowed(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        addresses = set()
        for count in range(5000):
            x = borrower.empty((3, 1000), np.float32, short_deadline())
            y = borrower.empty(200_000, np.float32, short_deadline())
            addresses |= {x.ctypes.data, y.ctypes.data}
            if count == 2:
                borrowed_bytes = borrower.borrowed_bytes
        del x, y

        assert len(addresses) <= 4
        assert borrower.borrowed_bytes == borrowed_bytes == lender.lent_bytes
        assert borrower.allocated_bytes == 0

    def test_arrays_of_any_sizes_never_overlap_and_all_comes_back(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        choose = random.Random(1)
        held: list[tuple[int, Array]] = []
        for number in range(3000):
            if len(held) > 20 or (held and choose.random() < 0.4):
                mark, array = held.pop(choose.randrange(len(held)))
                assert (array == mark).all()
            array = borrower.empty(
                choose.choice([1, 100, 5000, 20_000, 100_000]), np.float64, short_deadline()
            )
            array[...] = number
            held.append((number, array))
        assert all((array == mark).all() for mark, array in held)
        del array
        held.clear()

        assert borrower.allocated_bytes == 0
        assert borrower.borrowed_bytes == 64 * MIB

    def test_arrays_in_cycles_are_freed_by_the_collector(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        for _ in range(100):
            cycle: list[object] = [borrower.empty(MIB, np.float32, short_deadline())]
            cycle.append(cycle)
        del cycle
        gc.collect()

        assert borrower.allocated_bytes == 0

    def test_more_is_borrowed_as_it_is_needed(self, lender: Lender, borrower: Borrower) -> None:
        arrays = [borrower.empty(10 * MIB, np.float32, short_deadline()) for _ in range(4)]

        assert all(borrower.locate(array) for array in arrays)
        assert 160 * MIB <= borrower.borrowed_bytes == lender.lent_bytes

    def test_over_the_quota_arrays_are_ordinary_ones(
        self, path: Path, borrower: Borrower, caplog: pytest.LogCaptureFixture
    ) -> None:
        with start_lender(path, LoanLimits(MIB, MIB)):
            first = borrower.empty(MIB // 4, np.float32, short_deadline())
            second = borrower.empty(MIB // 4, np.float32, short_deadline())
            assert borrower.locate(first) is not None
            assert borrower.locate(second) is None
            del first
            assert (
                borrower.locate(borrower.empty(MIB // 8, np.float32, short_deadline())) is not None
            )
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

    def test_under_the_quota_unused_regions_make_room_for_larger_ones(
        self, path: Path, borrower: Borrower
    ) -> None:
        with start_lender(path, LoanLimits(100 * MIB, 100 * MIB)) as lender:
            borrower.empty(MIB, np.float32, short_deadline())
            assert lender.lent_bytes == 64 * MIB

            assert (
                borrower.locate(borrower.empty(24 * MIB, np.float32, short_deadline())) is not None
            )

            assert lender.lent_bytes == 96 * MIB
            borrower.close()

    def test_arrays_outlive_the_borrower_and_the_lender(self, path: Path) -> None:
        with start_lender(path) as lender:
            borrower = Borrower(lambda _: str(path))
            x = borrower.empty(MIB, np.float32, short_deadline())
            x[...] = 3
            borrower.close()
            assert lender.wait_until_unused(TIMEOUT_S)
        x += 1

        assert (x == 4).all()
        assert borrower.locate(x) is None
        assert borrower.locate(borrower.empty(3, np.float32, short_deadline())) is None

    def test_a_closed_borrower_leaves_no_descriptors(self, lender: Lender, path: Path) -> None:
        def borrow() -> None:
            borrower = Borrower(lambda _: str(path))
            borrower.empty(3, np.float32, short_deadline())
            borrower.close()
            assert lender.wait_until_unused(TIMEOUT_S)

        borrow()  # the lender opens what it watches clients' files with, and keeps it
        with leaves_no_descriptor():
            for _ in range(20):
                borrow()
            gc.collect()


class TestCalls:
    """What a call has in shared memory."""

    def test_operands_are_copied_in_and_results_come_as_views(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        x = np.random.default_rng(0).random(LARGE.shape, np.float32)
        with SharedCall(borrower, short_deadline()) as call:
            message, y = call.operand_message(x), call.allocate_result(LARGE)
            call.copy_operands()
            assert message is not None
            assert y is not None
            assert message.element_type == pb.ELEMENT_TYPE_FLOAT32
            assert tuple(message.shape) == LARGE.shape
            with (
                lend_tensor(lender, "x", slice_of(message), LARGE) as theirs,
                lend_tensor(lender, "y_place", y.shared_slice, LARGE) as place,
            ):
                np.multiply(theirs, 2, out=place)
        array = y.array
        del y, call
        np.testing.assert_array_equal(array, 2 * x)
        assert borrower.allocated_bytes == LARGE.nbytes
        del array
        assert borrower.allocated_bytes == 0

    def test_what_lies_there_already_is_not_copied(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        x = borrower.empty(LARGE.shape, FLOAT32, short_deadline())
        with SharedCall(borrower, short_deadline()) as call:
            message = call.operand_message(x)
            assert message is not None
            assert slice_of(message) == borrower.locate(x)
            assert borrower.allocated_bytes == x.nbytes

    @pytest.mark.parametrize("order", ["transposed", "swapped", "reversed"])
    def test_arrays_of_any_layout_are_copied_as_messages_have_them(
        self, lender: Lender, borrower: Borrower, order: str
    ) -> None:
        x = np.random.default_rng(0).random((512, 300), np.float32)
        x = {"transposed": x.T, "swapped": x.astype(">f4"), "reversed": x[::-1, ::-2]}[order]
        with SharedCall(borrower, short_deadline()) as call:
            message = call.operand_message(x)
            call.copy_operands()
            assert message is not None
            with lend_tensor(lender, "x", slice_of(message), TensorSpec(x.shape, FLOAT32)) as found:
                np.testing.assert_array_equal(found, x)

    def test_small_tensors_are_better_sent(self, lender: Lender, borrower: Borrower) -> None:
        with SharedCall(borrower, short_deadline()) as call:
            assert call.operand_message(np.empty(100)) is None
            assert call.operand_message(borrower.empty(100, np.float32, short_deadline())) is None
            assert not borrower.is_large(TensorSpec((100,), FLOAT32))
            assert not borrower.is_large(TensorSpec((0, 1), FLOAT32))

    def test_without_a_server_all_is_sent(self, borrower: Borrower) -> None:
        with SharedCall(borrower, short_deadline()) as call:
            assert call.operand_message(np.empty(LARGE.shape)) is None
            assert call.allocate_result(LARGE) is None

    @pytest.mark.parametrize(
        "error",
        [
            InvalidArgumentError("W does not fit x"),
            ExhaustedError("too large"),
            UnimplementedError("too old"),
            UnavailableError("full", retry_after_s=0.5),
        ],
    )
    def test_memory_of_a_call_that_was_refused_is_used_again(
        self, lender: Lender, borrower: Borrower, error: DeconvdError
    ) -> None:
        places = {failed_call(borrower, error) for _ in range(9)}

        assert len(places) <= 2  # x's and y's
        assert borrower.allocated_bytes == 0

    @pytest.mark.parametrize(
        "error",
        [
            DeadlineError("too late"),
            CallCancelledError("given up"),
            UnavailableError("the connection broke"),
            InternalError("what?"),
            KeyboardInterrupt(),
        ],
    )
    def test_memory_that_a_lost_call_may_still_write_to_serves_no_other(
        self, lender: Lender, borrower: Borrower, error: BaseException
    ) -> None:
        x = borrower.empty(LARGE.shape, FLOAT32, short_deadline())
        x[...] = 3
        place = failed_call(borrower, error)

        with lend_tensor(lender, "y_place", place, LARGE) as late:
            fresh = [borrower.empty(LARGE.shape, FLOAT32, short_deadline()) for _ in range(10)]
            for array in fresh:
                array[...] = 1
            late[...] = 2
        assert all((array == 1).all() for array in fresh)
        assert place not in [borrower.locate(array) for array in fresh]
        np.testing.assert_array_equal(seen_by(lender, borrower, x), x)  # still of use

    def test_its_region_is_given_back_once_nothing_lives_there(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        for _ in range(20):
            failed_call(borrower, DeadlineError("too late"))

        borrower.empty(3, np.float32, short_deadline())
        assert lender.lent_bytes <= 128 * MIB


class TestServerGone:
    """When the server goes, calls go on without its memory, and one line says so."""

    def test_a_restarted_server_lends_anew(
        self, path: Path, borrower: Borrower, caplog: pytest.LogCaptureFixture
    ) -> None:
        with start_lender(path):
            old = borrower.empty(LARGE.shape, FLOAT32, short_deadline())
            old[...] = 3
        with start_lender(path) as second:
            with SharedCall(borrower, short_deadline()) as call:
                assert borrower.locate(old) is None
                message = call.operand_message(old)
                call.copy_operands()
                assert message is not None
                with lend_tensor(second, "x", slice_of(message), LARGE) as found:
                    np.testing.assert_array_equal(found, old)
            borrower.close()
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1

    def test_without_it_calls_send_and_one_line_says_so(
        self, path: Path, borrower: Borrower, caplog: pytest.LogCaptureFixture
    ) -> None:
        with start_lender(path):
            x = borrower.empty(LARGE.shape, FLOAT32, short_deadline())
        for _ in range(5):
            with SharedCall(borrower, short_deadline()) as call:
                assert call.operand_message(x) is None
                assert call.allocate_result(LARGE) is None
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1

    def test_a_server_of_calls_that_is_not_the_lender_ends_it_for_good(
        self, path: Path, borrower: Borrower, lender: Lender, caplog: pytest.LogCaptureFixture
    ) -> None:
        failed_call(borrower, StaleRegionError("x must be in shared memory that this server lends"))

        with SharedCall(borrower, short_deadline()) as call:
            assert call.operand_message(np.ones(LARGE.shape, FLOAT32)) is None
        assert lender.wait_until_unused(TIMEOUT_S)
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1

    def test_a_stale_region_of_a_server_that_restarted_does_not(
        self, path: Path, borrower: Borrower
    ) -> None:
        with start_lender(path) as first:
            with pytest.raises(StaleRegionError), SharedCall(borrower, short_deadline()) as call:
                cut_off(call, first)
        with start_lender(path):
            with SharedCall(borrower, short_deadline()) as call:
                assert call.operand_message(np.ones(LARGE.shape, FLOAT32)) is not None
            borrower.close()

    def test_a_refusal_is_said_as_it_is(
        self, path: Path, borrower: Borrower, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        with start_lender(path, users=frozenset({54321})):
            assert borrower.allocate(MIB, short_deadline()) is None
        assert "the server does not lend memory to this user" in caplog.text

    def test_a_server_that_says_it_lends_nothing_is_not_asked_again(self) -> None:
        answers = iter([""])
        borrower = Borrower(lambda _: next(answers))

        assert [borrower.allocate(MIB, short_deadline()) for _ in range(3)] == [None] * 3

    def test_a_server_that_does_not_say_where_it_lends_disturbs_no_call(self) -> None:
        def fail(_: Deadline) -> str:
            raise UnavailableError("not yet")

        borrower = Borrower(fail)

        assert [borrower.allocate(MIB, short_deadline()) for _ in range(3)] == [None] * 3

    def test_a_server_that_is_long_in_answering_holds_up_no_other_thread(self, path: Path) -> None:
        is_asked, may_answer = threading.Event(), threading.Event()

        def find_socket(_: Deadline) -> str:
            is_asked.set()
            may_answer.wait(TIMEOUT_S)
            return str(path)

        borrower = Borrower(find_socket)
        with start_lender(path), ThreadPoolExecutor(1) as pool:
            asking = pool.submit(borrower.empty, 1000, FLOAT32, short_deadline())
            assert is_asked.wait(TIMEOUT_S)
            meanwhile = borrower.empty(1000, FLOAT32, short_deadline())
            may_answer.set()

            assert borrower.locate(asking.result(TIMEOUT_S)) is not None
            assert borrower.locate(meanwhile) is None
            assert borrower.locate(borrower.empty(1000, FLOAT32, short_deadline())) is not None
            del asking
            borrower.close()


class TestThreads:
    """Any number of threads may borrow at once."""

    def test_their_arrays_never_overlap(self, lender: Lender, borrower: Borrower) -> None:
        def work(mark: int) -> bool:
            choose = random.Random(mark)
            good = True
            for _ in range(200):
                x = borrower.empty(
                    choose.choice([100, 10_000, 100_000]), np.float32, short_deadline()
                )
                x[...] = mark
                found = seen_by(lender, borrower, x)
                good = good and bool((found == mark).all() and (x == mark).all())
            return good

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(8)))
        assert borrower.allocated_bytes == 0

    def test_the_collector_may_free_in_the_midst_of_taking(
        self, lender: Lender, borrower: Borrower
    ) -> None:
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(300):
                cycle: list[object] = [borrower.empty(1000, np.float32, short_deadline())]
                cycle.append(cycle)
        finally:
            gc.set_threshold(*threshold)
        del cycle
        gc.collect()
        assert borrower.allocated_bytes == 0


class TestProcesses:
    """Real processes exchange arrays, fork and die."""

    def test_two_processes_exchange_data_through_the_memory(
        self, lender: Lender, path: Path
    ) -> None:
        script = """
from deconvd.model.problem import TensorSpec
borrower = Borrower(find)
x = borrower.empty((1000, 1000), np.float32, soon())
x[...] = np.arange(x.size).reshape(x.shape)
with SharedCall(borrower, soon()) as call:
    message = call.operand_message(x)
    call.copy_operands()
    y = call.allocate_result(TensorSpec(x.shape, x.dtype))
    say(message.SerializeToString().hex())
    say(y.shared_slice.region.hex(), y.shared_slice.offset_bytes)
    input()
say(bool((y.array == 2 * x + 1).all()))
input()
"""
        with start_borrower_process(script, path) as client:
            x = pb.Tensor.FromString(bytes.fromhex(client.read_line()))
            place = told_slice(client.read_line())
            spec = TensorSpec((1000, 1000), FLOAT32)
            with (
                lend_tensor(lender, "x", slice_of(x), spec) as source,
                lend_tensor(lender, "y", place, spec) as y,
            ):
                np.add(2 * source, 1, out=y)
            client.write_line()
            assert client.read_line() == "True"
            assert lender.lent_bytes == 64 * MIB
            client.write_line()
            client.process.wait(TIMEOUT_S)
        assert lender.wait_until_unused(TIMEOUT_S)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_client_killed_while_its_memory_is_used_harms_no_one(
        self, lender: Lender, borrower: Borrower, path: Path, seed: int
    ) -> None:
        script = """
borrower = Borrower(find)
x = borrower.empty(1 << 20, np.float32, soon())
place = borrower.locate(x)
say(place.region.hex(), place.offset_bytes)
while True:
    x += 1
    borrower.empty(1000, np.float32, soon())
"""
        mine = borrower.empty(MIB, np.float32, short_deadline())
        mine[...] = 3
        with start_borrower_process(script, path) as client:
            theirs = told_slice(client.read_line())
            with lend_tensor(lender, "x", theirs, TensorSpec((MIB,), FLOAT32)) as x:
                for count in itertools.count():
                    x.sum()
                    if count == seed:
                        client.process.send_signal(signal.SIGKILL)
                        client.process.wait()
                    if client.process.returncode is not None:
                        break
                x[...] = 0
        assert (mine == 3).all()
        np.testing.assert_array_equal(seen_by(lender, borrower, mine), mine)
        mine_alone = borrower.borrowed_bytes
        borrower.close()
        assert mine_alone == 64 * MIB
        assert lender.wait_until_unused(TIMEOUT_S)

    def test_a_forked_child_leaves_its_parents_memory_alone(
        self, lender: Lender, path: Path
    ) -> None:
        script = """
import threading
from concurrent.futures import ThreadPoolExecutor
borrower = Borrower(find)
x = borrower.empty(1000, np.float32, soon())
x[...] = 3
stop = threading.Event()
def churn():
    while not stop.is_set():
        borrower.empty(1000, np.float32, soon())
thread = threading.Thread(target=churn)  # so that the fork meets the lock in any state
thread.start()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
codes = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        own = borrower.empty(1000, np.float32, soon())
        own[...] = 4
        good = borrower.locate(x) is None and borrower.locate(own) is not None and (x == 3).all()
        os._exit(0 if good else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
thread.join()
say(sum(codes), bool((x == 3).all()), borrower.locate(x) is not None)
pid = os.fork()
if pid == 0:
    sys.stdin.readline()
    os._exit(0)
say("forked")
os.kill(os.getpid(), 9)
"""
        with start_borrower_process(script, path) as client:
            assert client.read_line() == "0 True True"
            assert client.read_line() == "forked"
            client.process.wait(TIMEOUT_S)
            # The grandchild lives, and holds no lease of its parent's.
            assert lender.wait_until_unused(TIMEOUT_S)


def test_nothing_is_connected_before_the_first_need(path: Path) -> None:
    threads = threading.active_count()
    borrower = Borrower(lambda _: str(path))

    with SharedCall(borrower, short_deadline()) as call:
        assert call.operand_message(np.empty(3)) is None

    assert threading.active_count() == threads
    borrower.close()


def test_a_borrower_knows_whether_memory_is_lent_before_it_borrows(
    lender: Lender, borrower: Borrower, path: Path
) -> None:
    assert borrower.has_lender(short_deadline())
    assert borrower.borrowed_bytes == 0
    assert not Borrower(lambda _: "").has_lender(short_deadline())
    assert not Borrower(lambda _: f"{path}.elsewhere").has_lender(short_deadline())
