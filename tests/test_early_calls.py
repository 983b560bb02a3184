"""Calls that are made while their client is still copying x into shared memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import (
    FRAME_HEAD_BYTES,
    Answer,
    CallHead,
    FrameKind,
    MethodCode,
    pack_frame,
)
from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.errors import DeadlineError, ExhaustedError, InvalidArgumentError
from deconvd.host import parallel_copy
from deconvd.host.adaptive_backoff import AdaptiveBackoff
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client import Connection
from deconvd_client.calls.overlapped_copy import OverlappedCopy, SharedOperand
from deconvd_client.shared_memory import Borrower
from deconvd_client.transports.direct import pool
from deconvd_server.exit_codes import ExitCode
from tests.deadlines import short_deadline
from tests.direct_calls import (
    calls_path,
    get_server_info,
    is_serving,
    open_stream,
    receive_answer,
    receive_failure,
    send_call,
    wait_until_idle,
)
from tests.processes import lent_bytes, process_resources, wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import open_session, tensor_by_handle
from tests.stream_pairs import send_raw

SHAPE = (60, 1, 192, 192)
"""Of float32: 8.4 MiB, just enough for a call to be early."""

W = np.full((1, 1, 1, 1), 3, np.float32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--log-level", "debug") as running:
        yield running


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What clients of this process say of how far they have come."""
    sizes: list[int] = []

    def tell(line: FrameStream, size_bytes: int) -> None:
        sizes.append(size_bytes)
        report_progress(line, size_bytes)

    monkeypatch.setattr(pool, "report_progress", tell)
    return sizes


@pytest.fixture
def piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one thread copy: how many pieces several threads end between two reports is chance."""
    monkeypatch.setattr(parallel_copy, "processors_count", lambda: 1)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients be early although no card follows them."""
    monkeypatch.setattr(AdaptiveBackoff, "is_due", lambda _: True)


def random_x(seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-4, 5, SHAPE).astype(np.float32)


def goes_directly(F: Connection, server: ServerProcess) -> bool:
    before = server.log.read_text()
    F.deconvolution_2d(W, W)
    return "Deconvolve from unix: process" in server.log.read_text().removeprefix(before)


@contextmanager
def directly_connected(server: ServerProcess) -> Iterator[Connection]:
    """Connect for the block, whose calls are direct: the first of a connection may come before there is a line."""
    with deconvd_client.connect(server.target) as F:
        wait_until(lambda: goes_directly(F, server))
        yield F


@pytest.mark.usefixtures("always")
class TestClient:
    """What a client does for an x that is not in shared memory."""

    @pytest.mark.parametrize(
        "layout",
        [
            np.array,
            np.asfortranarray,
            lambda x: np.repeat(x, 2, axis=3)[:, :, :, ::2],
            lambda x: np.flip(np.flip(x, 0).copy(), 0),
            lambda x: x.astype(">f4"),
            lambda x: x.astype(np.float16),
        ],
        ids=["plain", "by columns", "strided", "backwards", "big-endian", "small"],
    )
    def test_x_of_any_layout_arrives_as_it_is(
        self, server: ServerProcess, told: list[int], layout: Callable[[Array], Array]
    ) -> None:
        with directly_connected(server) as F:
            for seed in range(3):
                x = layout(random_x(seed))
                y = F.deconvolution_2d(x, W.astype(x.dtype))
                np.testing.assert_array_equal(y, x * 3)

        is_large = x.nbytes >= 8 << 20
        assert told.count(x.nbytes) == (3 if is_large else 0)
        assert len(told) <= 3 * 8

    @pytest.mark.parametrize("processors_count", [1, 4])
    def test_progress_is_told_in_order_by_any_number_of_threads(
        self,
        server: ServerProcess,
        told: list[int],
        monkeypatch: pytest.MonkeyPatch,
        processors_count: int,
    ) -> None:
        monkeypatch.setattr("deconvd.host.parallel_copy.processors_count", lambda: processors_count)
        x = np.concatenate([random_x(seed) for seed in range(6)])
        with directly_connected(server) as F:
            np.testing.assert_array_equal(F.deconvolution_2d(x, W), x * 3)

        assert len(told) > 4 or processors_count > 1  # how many pieces end at once is chance
        assert told == sorted(set(told))
        assert told[-1] == x.nbytes

    def test_x_in_shared_memory_and_calls_by_grpc_are_not_early(
        self, server: ServerProcess, told: list[int]
    ) -> None:
        x = random_x()
        with directly_connected(server) as F:
            lent = F.empty(x.shape, x.dtype)
            lent[...] = x
            np.testing.assert_array_equal(F.deconvolution_2d(lent, W), x * 3)
        with deconvd_client.connect(server.target, transport="grpc") as F:
            np.testing.assert_array_equal(F.deconvolution_2d(x, W), x * 3)
        assert not told

    @pytest.mark.usefixtures("piece_by_piece")
    def test_what_is_refused_meanwhile_is_not_copied_to_its_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[bool] = []
        make = OverlappedCopy.run

        def watched(copy: OverlappedCopy, tell: Callable[[int], None] | None = None) -> None:
            try:
                make(copy, tell)
            finally:
                made.append(copy.is_done)

        def refused_by_now(line: FrameStream, _size_bytes: int) -> None:
            assert line.poll(30)

        monkeypatch.setattr(OverlappedCopy, "run", watched)
        monkeypatch.setattr(pool, "report_progress", refused_by_now)
        x = np.concatenate([random_x()] * 4)
        with server_process(
            tmp_path, "--device-memory-bytes", "16Mi", "--log-level", "debug"
        ) as little:
            with directly_connected(little) as F:
                with pytest.raises(ExhaustedError, match="of which calls may take"):
                    F.deconvolution_2d(x, W)

                assert made == [False]
                np.testing.assert_array_equal(F.deconvolution_2d(x[:1], W), x[:1] * 3)

    @pytest.mark.usefixtures("piece_by_piece")
    def test_a_call_whose_line_breaks_meanwhile_is_made_again_with_all_of_x(
        self, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken: list[int] = []

        def tell(line: FrameStream, size_bytes: int) -> None:
            if len(broken) % 3 == 1:
                line.shutdown()
            broken.append(size_bytes)
            report_progress(line, size_bytes)

        monkeypatch.setattr(pool, "report_progress", tell)
        with directly_connected(server) as F:
            for seed in range(4):
                wait_until(lambda: goes_directly(F, server))  # there is a line again
                x = random_x(seed)
                np.testing.assert_array_equal(F.deconvolution_2d(x, W), x * 3)
        assert len(broken) > 4
        wait_until_idle(server)

    def test_what_interrupts_the_copy_is_the_callers(
        self, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = random_x()
        with directly_connected(server) as F:
            np.testing.assert_array_equal(F.deconvolution_2d(x, W), x * 3)
            with monkeypatch.context() as interrupted:
                interrupted.setattr(pool, "report_progress", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    F.deconvolution_2d(x, W)
            wait_until_idle(server)
            np.testing.assert_array_equal(F.deconvolution_2d(x, W), x * 3)

    def test_copies_are_made_once(self) -> None:
        source, target = np.ones(4, np.float32), np.zeros(4, np.float32)
        copy, told = OverlappedCopy([SharedOperand(16, (target, source))]), list[int]()

        copy.run(told.append)
        target[:] = 2
        copy.run(told.append)
        copy.run()

        assert copy.is_done
        assert target.tolist() == [2] * 4
        assert told == [16]

    def test_what_is_there_at_first_counts(self) -> None:
        source, target = np.ones(3 << 20, np.float32), np.zeros(3 << 20, np.float32)
        size_bytes = source.nbytes
        operands = [
            SharedOperand(100, None),
            SharedOperand(size_bytes, (target, source)),
            SharedOperand(7, None),
        ]
        copy, told = OverlappedCopy(operands), list[int]()

        copy.run(told.append)

        assert copy.initial_bytes == 100
        assert told == sorted(set(told))
        assert told[0] > 100
        assert told[-1] == 100 + size_bytes + 7
        np.testing.assert_array_equal(target, source)

    @pytest.mark.usefixtures("piece_by_piece")
    def test_the_end_of_each_operand_is_told(self) -> None:
        sizes_bytes = (2 << 20, 40 << 20)
        arrays = [(np.zeros(n, np.uint8), np.ones(n, np.uint8)) for n in sizes_bytes]
        copy = OverlappedCopy(
            [SharedOperand(n, pair) for n, pair in zip(sizes_bytes, arrays, strict=True)]
        )
        told: list[int] = []

        copy.run(told.append)

        assert told[0] == 2 << 20
        assert told[-1] == 42 << 20
        assert len(told) <= 10
        assert all(target.all() for target, _ in arrays)

    @pytest.mark.parametrize("lent", [(), ("W",), ("x",)])
    @pytest.mark.usefixtures("piece_by_piece")
    def test_a_large_W_may_be_late_too(
        self, server: ServerProcess, told: list[int], lent: tuple[str, ...]
    ) -> None:
        random = np.random.default_rng(0)
        with directly_connected(server) as F:
            for _ in range(3):
                x = random.integers(-9, 9, (2, 2048, 24, 24)).astype(np.float32)
                W = random.integers(-9, 9, (2048, 1100, 1, 1)).astype(np.float32)
                expected = np.einsum("nihw,io->nohw", x, W[:, :, 0, 0], optimize=True)
                if "W" in lent:
                    W, plain = F.empty(W.shape, W.dtype), W
                    W[...] = plain
                if "x" in lent:
                    x, plain = F.empty(x.shape, x.dtype), x
                    x[...] = plain
                np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
        assert told.count(W.nbytes + x.nbytes) == 3
        assert all(size_bytes > W.nbytes for size_bytes in told) == ("W" in lent)

    @pytest.mark.parametrize("lent", [(), ("W", "gy"), ("x",)])
    @pytest.mark.parametrize("wanted", [("gx",), ("gx", "gW", "gb"), ("gW",)])
    def test_calls_for_gradients_may_be_early_too(
        self,
        server: ServerProcess,
        told: list[int],
        wanted: tuple[str, ...],
        lent: tuple[str, ...],
    ) -> None:
        random = np.random.default_rng(0)
        shapes = {"x": (2, 2048, 24, 24), "W": (2048, 1100, 1, 1), "gy": (2, 1100, 24, 24)}
        with directly_connected(server) as F:
            given: dict[str, Array] = {}
            for name, shape in shapes.items():
                plain = random.integers(-3, 4, shape).astype(np.float32)
                given[name] = F.empty(shape, np.float32) if name in lent else plain
                given[name][...] = plain
            x, W, gy = given["x"], given["W"], given["gy"]
            b = np.zeros(1100, np.float32)
            for _ in range(2):
                found = F.deconvolution_2d_grad(x, W, b, gy, wanted=wanted)
        right = {
            "gx": np.einsum("nohw,io->nihw", gy, W[:, :, 0, 0], optimize=True),
            "gW": np.einsum("nihw,nohw->io", x, gy, optimize=True)[:, :, None, None],
            "gb": gy.sum((0, 2, 3)),
        }
        for name, gradient in found._asdict().items():
            assert (gradient is None) == (name not in wanted)
            if gradient is not None:
                np.testing.assert_array_equal(gradient, right[name])
        sent = {"W": "gx" in wanted, "gy": True, "x": "gW" in wanted}
        sent_bytes = sum(given[name].nbytes for name, is_sent in sent.items() if is_sent)
        copied = [
            given[name].nbytes for name, is_sent in sent.items() if is_sent and name not in lent
        ]
        assert told.count(sent_bytes) == (2 if sum(copied) >= 8 << 20 else 0)

    def test_copies_that_no_card_could_follow_are_made_first(
        self, server: ServerProcess, told: list[int]
    ) -> None:
        x = np.ones((1, 2048, 1, 1), np.float32)  # comes with the call
        W = np.full((2048, 1100, 1, 1), 2, np.float32)
        gy = np.ones((1, 1100, 1, 1), np.float32)
        with directly_connected(server) as F:
            assert (F.deconvolution_2d(x, W) == 4096).all()
            gx, gW, _ = F.deconvolution_2d_grad(x, W, None, gy)
            large_x = np.ones((8, 2048, 8, 8), np.float32)
            y = F.deconvolution_2d(F.put(large_x), W)  # x is there
            np.testing.assert_array_equal(y, F.deconvolution_2d(F.put(large_x), F.put(W)))
        assert gx is not None
        assert gW is not None
        assert (gx == 2200).all()
        assert (gW == 1).all()
        assert W.nbytes > 8 << 20
        assert told == []

    def test_a_client_that_dies_while_copying_leaves_nothing(self, server: ServerProcess) -> None:
        x = random_x()
        with directly_connected(server) as F:
            F.deconvolution_2d(x, W)  # whatever is made once is made
        wait_until_idle(server)
        pid = server.process.pid
        wait_until(lambda: lent_bytes(pid) == 0)
        before = process_resources(pid)
        for after_count in (1, 2, 3):
            command = [sys.executable, "-c", _DYING_CLIENT, server.target, str(after_count)]
            assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
        wait_until_idle(server)
        wait_until(lambda: lent_bytes(pid) == 0)
        wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)
        wait_until(lambda: process_resources(pid).threads_count <= before.threads_count)


def test_a_server_that_follows_no_copy_is_seldom_called_early(
    server: ServerProcess, told: list[int]
) -> None:
    x = random_x()
    with directly_connected(server) as F:
        for _ in range(60):
            F.deconvolution_2d(x, W)
    assert told.count(x.nbytes) == 5  # then after 1, 3, 7 and 15 others


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


_DYING_CLIENT = """
import os, signal, sys
import numpy as np
import deconvd_client
from deconvd_client import Connection
from deconvd_client.transports.direct import pool

told = 0

def tell(line, size_bytes):
    global told
    told += 1
    if told == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

pool.report_progress = tell
with deconvd_client.connect(sys.argv[1]) as F:
    x, W = np.ones((1, 16, 2048, 2048), np.float32), np.ones((16, 1, 1, 1), np.float32)
    while True:  # the first calls may come before there is a line
        F.deconvolution_2d(x, W)
"""


class TestServer:
    """What a server makes of early calls, whatever their clients say and do."""

    @pytest.fixture
    def borrower(self, server: ServerProcess) -> Iterator[Borrower]:
        lends = Borrower(lambda _: get_server_info(server).shared_memory_socket, is_only_way=True)
        yield lends
        lends.close()

    @pytest.fixture
    def x(self, borrower: Borrower) -> Array:
        """An array in shared memory, not yet written."""
        x = borrower.empty(SHAPE, np.float32, short_deadline())
        x[...] = np.nan
        return x

    @pytest.fixture
    def line(self, server: ServerProcess) -> Iterator[FrameStream]:
        with open_stream(server) as opened:
            opened.set_deadline(60)
            yield opened

    def request(
        self, borrower: Borrower, x: Array, stride: int = 1
    ) -> tuple[pb.DeconvolveRequest, Array]:
        """Return a request for y in shared memory, and that."""
        geometry = Geometry(stride=(stride, stride))
        y = Problem(spec_of(x), spec_of(W), geometry).y
        lent = borrower.empty(y.shape, y.dtype, short_deadline())
        request = pb.DeconvolveRequest(
            x=message_from_spec(spec_of(x)),
            w=message_from_array(W),
            geometry=message_from_geometry(geometry),
        )
        for array, message in ((x, request.x.shared), (lent, request.y_place)):
            place = borrower.locate(array)
            assert place is not None
            place.write_to(message)
        return request, lent

    def begin(
        self, line: FrameStream, request: pb.DeconvolveRequest, timeout_s: float = 60
    ) -> None:
        data = request.SerializeToString()
        send_call(line, MethodCode.Deconvolve, data, timeout_s=timeout_s, is_early=True)

    def test_it_waits_for_all_of_x(self, borrower: Borrower, x: Array, line: FrameStream) -> None:
        for seed in range(3):
            x[...] = np.nan
            source, (request, y) = random_x(seed), self.request(borrower, x)
            self.begin(line, request)
            for end in (7, 30, 60):
                assert not line.poll(0.05)
                x[:end] = source[:end]
                report_progress(line, x[:end].nbytes)
            assert isinstance(receive_answer(line), Answer)
            np.testing.assert_array_equal(y, source * 3)

    def test_others_are_served_meanwhile(
        self, server: ServerProcess, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        waiting = [open_stream(server) for _ in range(8)]
        for other in (*waiting, line):
            self.begin(other, self.request(borrower, x)[0])
        with deconvd_client.connect(server.target, timeout_s=30) as F:
            for _ in range(3):
                np.testing.assert_array_equal(F.deconvolution_2d(W, W), W * 3)
            (device,) = F.server_info().devices
            assert device.running_calls_count == device.waiting_calls_count == 0
        x[...] = 1
        for other in (*waiting, line):
            report_progress(other, x.nbytes)
            assert isinstance(receive_answer(other), Answer)
        for other in waiting:
            other.close()

    def test_what_is_never_written_ends_at_the_deadline_and_the_line_still_serves(
        self, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        for written_bytes in (None, 1000):
            self.begin(line, self.request(borrower, x)[0], timeout_s=0.5)
            if written_bytes is not None:
                report_progress(line, written_bytes)
            began_s = time.monotonic()
            assert isinstance(receive_failure(line), DeadlineError)
            assert time.monotonic() - began_s < 20
            report_progress(line, x.nbytes)  # too late
            assert is_serving(line)

    def test_half_a_frame_is_waited_for_no_longer(
        self, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        self.begin(line, self.request(borrower, x)[0], timeout_s=0.5)
        told = pack_frame(FrameKind.PROGRESS, x.nbytes.to_bytes(8, "little"))
        send_raw(line, told[:9])
        assert isinstance(receive_failure(line), DeadlineError)
        send_raw(line, told[9:])
        assert is_serving(line)

    def test_a_call_that_is_refused_is_answered_before_x_is_written(
        self, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        request, _ = self.request(borrower, x)
        request.geometry.stride.h = 0
        self.begin(line, request)
        assert isinstance(receive_failure(line), InvalidArgumentError)
        for end in range(10, 61, 10):
            report_progress(line, x[:end].nbytes)
        assert is_serving(line)
        assert is_serving(line)

    def test_a_client_that_says_more_than_is_true_harms_its_result_alone(
        self, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        for lie in (x.nbytes, 2**64 - 1):
            self.begin(line, self.request(borrower, x)[0])
            report_progress(line, lie)
            assert isinstance(receive_answer(line), Answer)
            assert is_serving(line)

    def test_what_is_not_said_in_order_is_waited_for(
        self, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        request, y = self.request(borrower, x)
        self.begin(line, request)
        for written_bytes in (1000, 10, 0, 1000):
            report_progress(line, written_bytes)
        assert not line.poll(0.1)
        x[...] = 1
        report_progress(line, x.nbytes)
        assert isinstance(receive_answer(line), Answer)
        np.testing.assert_array_equal(y, x * 3)

    @pytest.mark.parametrize(
        ("kind", "payload"),
        [
            (FrameKind.PROGRESS, b"x" * 9),
            (FrameKind.MESSAGE, b"x" * 8),
            (FrameKind.END, b"x" * 8),
            (FrameKind.CALL, b"x" * 100),
        ],
        ids=str,
    )
    def test_another_frame_ends_the_line(
        self,
        server: ServerProcess,
        borrower: Borrower,
        x: Array,
        line: FrameStream,
        kind: FrameKind,
        payload: bytes,
    ) -> None:
        self.begin(line, self.request(borrower, x)[0])
        send_raw(line, pack_frame(kind, payload))
        with pytest.raises(ConnectionBrokenError):
            receive_answer(line)
        wait_until_idle(server)
        with open_stream(server) as other:
            assert is_serving(other)

    @pytest.mark.parametrize(
        "method",
        [m for m in MethodCode if m not in (MethodCode.Deconvolve, MethodCode.DeconvolveGrad)],
    )
    def test_no_other_method_can_be_early(
        self, server: ServerProcess, line: FrameStream, method: MethodCode
    ) -> None:
        send_call(line, method, b"", is_early=True)
        with pytest.raises(ConnectionBrokenError):
            receive_answer(line)
        assert f"overlapped call of {method.name}" in server.log.read_text()
        with pytest.raises(ConnectionBrokenError, match="overlapped"):
            CallHead.parse(CallHead(method, 1, b"", is_overlapped=True).pack()[FRAME_HEAD_BYTES:])

    @pytest.mark.parametrize("field", ["x", "w"])
    def test_what_is_to_be_kept_is_waited_for(
        self, server: ServerProcess, borrower: Borrower, x: Array, line: FrameStream, field: str
    ) -> None:
        source, (request, y) = random_x(), self.request(borrower, x)
        lent_W = borrower.empty(W.shape, W.dtype, short_deadline())
        lent_W[...] = np.nan
        place = borrower.locate(lent_W)
        assert place is not None
        place.write_to(request.w.shared)
        with open_session(server.target) as held:
            request.session = held.session
            setattr(request.keep, field, True)
            self.begin(line, request)
            assert not line.poll(0.2)
            lent_W[...] = W
            report_progress(line, W.nbytes)
            assert not line.poll(0.2)
            x[...] = source
            report_progress(line, W.nbytes + x.nbytes)
            answered = receive_answer(line)
            assert isinstance(answered, Answer), answered
            response = pb.DeconvolveResponse.FromString(answered.message)
            kept = getattr(response.kept, field)
            np.testing.assert_array_equal(y, source * 3)
            operand, origin = (x, source) if field == "x" else (lent_W, W)
            operand[...] = y[...] = np.nan
            getattr(request, field).CopyFrom(tensor_by_handle(origin, kept.handle))
            request.ClearField("keep")
            held.stub.Deconvolve(request)
            np.testing.assert_array_equal(y, source * 3)

    @pytest.mark.parametrize("written_bytes", [None, 1000])
    def test_a_client_that_goes_leaves_nothing(
        self,
        server: ServerProcess,
        borrower: Borrower,
        x: Array,
        line: FrameStream,
        written_bytes: int | None,
    ) -> None:
        self.begin(line, self.request(borrower, x)[0])
        if written_bytes is not None:
            report_progress(line, written_bytes)
        line.close()
        borrower.close()
        wait_until_idle(server)
        with open_stream(server) as other:
            assert is_serving(other)

    def test_a_drain_lets_an_early_call_end(
        self, server: ServerProcess, borrower: Borrower, x: Array, line: FrameStream
    ) -> None:
        self.begin(line, self.request(borrower, x)[0])
        wait_until(lambda: "Deconvolve from" in server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        socket_path = calls_path(server)
        wait_until(lambda: not socket_path.exists())  # it drains
        x[...] = 1
        report_progress(line, x.nbytes)
        assert isinstance(receive_answer(line), Answer)  # it was under way
        assert server.process.wait(30) == 0


def test_a_drain_ends_what_is_never_written(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-timeout-s", "1", "--log-level", "debug") as server:
        lends = Borrower(lambda _: get_server_info(server).shared_memory_socket, is_only_way=True)
        x = lends.empty(SHAPE, np.float32, short_deadline())
        helper = TestServer()
        with open_stream(server) as line:
            line.set_deadline(30)
            helper.begin(line, helper.request(lends, x)[0])
            wait_until(lambda: "Deconvolve from" in server.log.read_text())
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionBrokenError):
                receive_answer(line)
            assert server.process.wait(30) == ExitCode.CUT_SHORT
        lends.close()
