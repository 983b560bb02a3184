"""Calls are served alike, whichever transport brings them, and observers hear of each."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd import errors
from deconvd.direct.events import MethodCode
from deconvd.errors import CallCancelledError, DeconvdError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.ledger import ledger_from_metadata, parse_ledger
from deconvd.wire.status import error_from_status
from deconvd_client.transports.direct.connectors import connector_for
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.call.ledger import Stage
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.settings import Settings
from deconvd_server.transports.observers import CallLog
from deconvd_server.transports.serve import CallScope
from tests.deadlines import short_deadline
from tests.devices import FailingDevice
from tests.direct_calls import REQUEST, W, X, open_with_retries, send_call
from tests.processes import wait_until
from tests.servers import only_server

TRANSPORTS = pytest.mark.parametrize(
    ("transport", "peer"), [("grpc", "ipv4:127.0.0.1:"), ("tcp", "tcp: 127.0.0.1:")]
)
LONG = np.ones((64, 4, 128, 128), np.float32)


class Event(NamedTuple):
    """What an observer has heard. It has no status where a call begins."""

    method: str
    call: CallContext
    status: str | None = None
    error: Exception | None = None


class Recorder:
    """An observer that remembers what it has heard."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def begin(self, method: str, call: CallContext) -> None:
        self.events.append(Event(method, call))

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        self.events.append(Event(method, call, status, error))

    def of(self, method: str, peer: str = "") -> list[Event]:
        """Return what was heard of a method's calls."""
        return [e for e in self.events if e.method == method and e.call.peer.startswith(peer)]

    def statuses(self, method: str, peer: str = "") -> list[str | None]:
        return [event.status for event in self.of(method, peer)]


class PatientDevice(CpuDevice):
    """A device that works until the caller goes, and then raises `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error
        self.is_at_work = threading.Event()

    def run(self, *args: Any) -> None:
        (call,) = (argument for argument in args if isinstance(argument, CallContext))
        has_gone = threading.Event()
        call.on_cancel(has_gone.set)
        self.is_at_work.set()
        assert has_gone.wait(30)
        raise self.error


@contextmanager
def observed(device: CpuDevice, recorder: Recorder) -> Iterator[str]:
    """Serve with an observer for the block, which is given the address."""
    settings = Settings(["127.0.0.1:0"], 2 << 20, drain_timeout_s=10)
    daemon = Daemon(settings, [CallLog(), recorder])
    daemon.serve(lambda: [device])
    try:
        yield daemon.addresses[0]
    finally:
        daemon.drain()


@TRANSPORTS
def test_an_observer_hears_who_calls_what_and_where_the_time_went(
    transport: str, peer: str
) -> None:
    recorder = Recorder()

    with (
        observed(CpuDevice(1), recorder) as address,
        deconvd_client.connect(address, transport=transport, timeout_s=30) as F,
    ):
        # the first calls may come before there is a line
        wait_until(
            lambda: F.deconvolution_2d(X, W) is not None and any(recorder.of("Deconvolve", peer))
        )

    begin, end = recorder.of("Deconvolve", peer)[-2:]
    ledger = parse_ledger(ledger_from_metadata(end.call.ledger.as_metadata()))
    assert (begin.status, end.status, end.error) == (None, "OK", None)
    assert begin.call is end.call
    assert ledger[Stage.COMPUTE] <= ledger[Stage.SERVER]


@TRANSPORTS
def test_an_observer_hears_of_streams(transport: str, peer: str) -> None:
    recorder = Recorder()

    with (
        observed(CpuDevice(1), recorder) as address,
        deconvd_client.connect(address, transport=transport, timeout_s=30) as F,
    ):
        wait_until(
            lambda: (
                F.deconvolution_2d(LONG, W) is not None
                and any(recorder.of("DeconvolveStream", peer))
            )
        )

    assert recorder.statuses("DeconvolveStream", peer)[-2:] == [None, "OK"]


@TRANSPORTS
@pytest.mark.parametrize(
    "error",
    [errors.ExhaustedError("no room"), ZeroDivisionError("swordfish"), MemoryError("swordfish")],
)
def test_an_observer_hears_what_a_call_failed_with(
    error: Exception, transport: str, peer: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    told = error if isinstance(error, DeconvdError) else errors.InternalError()
    if isinstance(error, MemoryError):
        told = errors.ExhaustedError()

    with (
        observed(FailingDevice(error), recorder) as address,
        deconvd_client.connect(address, transport=transport, timeout_s=30) as F,
    ):

        def fails() -> bool:
            with pytest.raises(type(told)) as raised:
                F.deconvolution_2d(X, W)
            assert "swordfish" not in str(raised.value)
            return any(recorder.of("Deconvolve", peer))

        wait_until(fails)

    end = recorder.of("Deconvolve", peer)[-1]
    assert (end.status, end.error) == (told.status, error)
    assert f"Deconvolve from {peer}" in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)


GONE = pytest.mark.parametrize("error", [CallCancelledError("gone"), ValueError("it is closed")])


@GONE
def test_a_caller_that_goes_has_cancelled_its_call_by_grpc(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, device = Recorder(), PatientDevice(error)

    with observed(device, recorder) as address, grpc.insecure_channel(address) as channel:
        call = pb_grpc.DeconvolutionServiceStub(channel).Deconvolve.future(REQUEST)
        assert device.is_at_work.wait(30)
        call.cancel()
        wait_until(lambda: recorder.statuses("Deconvolve") == [None, "CANCELLED"])

    assert recorder.events[-1].error is error
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@GONE
def test_a_caller_that_goes_has_cancelled_its_direct_call(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, device = Recorder(), PatientDevice(error)

    with observed(device, recorder) as address:
        with deconvd_client.connect(address, transport="grpc") as F:
            info = only_server(F).route.server_info(short_deadline())
        way = connector_for(address)
        assert way is not None
        line = open_with_retries(way, lambda: info)
        send_call(line, MethodCode.Deconvolve, REQUEST.SerializeToString())
        assert device.is_at_work.wait(30)
        line.close()
        wait_until(lambda: recorder.statuses("Deconvolve") == [None, "CANCELLED"])

    assert recorder.events[-1].error is error
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_response_that_nobody_wants_the_rest_of_ends_its_call_once() -> None:
    recorder = Recorder()

    with observed(CpuDevice(1), recorder) as address, grpc.insecure_channel(address) as channel:
        signs = threading.Event()

        def hold() -> Iterator[Any]:
            yield pb.HoldSessionRequest()
            signs.wait(30)

        held = pb_grpc.DeconvolutionServiceStub(channel).HoldSession(hold())
        next(held)
        held.cancel()
        wait_until(lambda: len(recorder.of("HoldSession")) == 2)
        signs.set()

    assert recorder.statuses("HoldSession") == [None, "CANCELLED"]


def served(work: Callable[[CallContext], None], recorder: Recorder) -> CallScope:
    """Serve a call by `work`, and return how it went."""
    serving = CallScope("Deconvolve", CallContext(30, "tcp: here"), [recorder, CallLog()])
    with serving as call:
        work(call)
    return serving


def raising(error: BaseException) -> Callable[[CallContext], None]:
    def work(call: CallContext) -> None:
        raise error

    return work


def test_a_call_begins_with_its_deadline_and_its_peer() -> None:
    calls: list[CallContext] = []

    serving = served(calls.append, Recorder())

    (call,) = calls
    remaining_s = call.remaining_s()
    assert remaining_s is not None
    assert 0 < remaining_s <= 30
    assert call.peer == "tcp: here"
    assert call is serving.call
    assert serving.failure is None


def test_a_call_that_the_server_has_stopped_is_told_why_whatever_came_of_it() -> None:
    serving = CallScope("Deconvolve", CallContext(), ())

    with serving as call:
        call.stop(errors.UnavailableError("others ask", retry_after_s=1))
        call.check()

    assert serving.failure is not None
    with pytest.raises(errors.UnavailableError, match="others ask"):
        raise error_from_status(serving.failure)


@pytest.mark.parametrize("cls", DeconvdError.__subclasses__())
def test_a_foreseen_error_is_told_whole(cls: type[DeconvdError]) -> None:
    recorder = Recorder()

    failure = served(raising(cls("the kernel is wider than the image")), recorder).failure

    assert failure is not None
    told = error_from_status(failure)
    assert (type(told), str(told)) == (cls, "the kernel is wider than the image")
    assert recorder.statuses("Deconvolve") == [None, cls.status]


@pytest.mark.parametrize(
    ("error", "level", "text"),
    [
        (errors.ExhaustedError("no\nroom"), logging.WARNING, "RESOURCE_EXHAUSTED: no\\nroom"),
        (CallCancelledError("gone"), logging.INFO, "CANCELLED: gone"),
        (ZeroDivisionError("zero"), logging.ERROR, "INTERNAL: unforeseen error"),
    ],
)
def test_the_log_has_each_failure_once(
    error: Exception, level: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    request_id = served(raising(error), Recorder()).call.request_id

    (record,) = caplog.records
    line = f"Deconvolve from tcp: here (request {request_id}): {text}"
    assert (record.levelno, record.getMessage()) == (level, line)
    assert request_id
    assert (record.exc_info is not None) == (level == logging.ERROR)


def test_the_log_has_a_calls_begin_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    served(lambda call: None, Recorder())

    assert [record.getMessage() for record in caplog.records] == [
        "Deconvolve from tcp: here: begun"
    ]
    assert caplog.records[0].levelno == logging.DEBUG


def test_an_unforeseen_error_of_a_caller_who_has_gone_is_nothing_to_look_into(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    recorder = Recorder()

    def work(call: CallContext) -> None:
        call.cancel()
        raise ValueError("the file is closed")

    call = served(work, recorder).call

    (record,) = caplog.records
    assert record.levelno == logging.INFO
    line = f"Deconvolve from tcp: here (request {call.request_id}): CANCELLED: the caller has gone"
    assert record.getMessage() == line
    assert recorder.statuses("Deconvolve") == [None, "CANCELLED"]


@pytest.mark.parametrize("error", [CallerGoneError("reset by peer"), GeneratorExit()])
def test_what_nobody_can_be_told_of_cancels_the_call_and_is_the_transports(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recorder = Recorder()

    with pytest.raises(type(error)):
        served(raising(error), recorder)

    end = recorder.events[-1]
    assert (end.status, end.error, end.call.is_cancelled) == ("CANCELLED", None, True)
    assert not caplog.records


def test_a_failed_call_keeps_nothing_that_its_work_held() -> None:
    class Tensor:
        """Something large."""

    held: list[weakref.ref[Tensor]] = []

    def work(call: CallContext) -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise errors.ExhaustedError("no room")

    gc.disable()
    try:
        serving = CallScope("Deconvolve", CallContext(30), [CallLog()])
        with serving as call:
            work(call)
        assert serving.failure is not None
        assert held[0]() is None
    finally:
        gc.enable()
