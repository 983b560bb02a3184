"""The client against a server whose every byte may be damaged: its errors are DeconvdErrors, and come in time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2

import deconvd_client
from deconvd.direct.events import (
    Answer,
    EndOfStream,
    FrameKind,
    Hello,
    MessagePart,
    PieceHead,
    pack_frame,
)
from deconvd.errors import InvalidArgumentError, LostTensorError, UnavailableError
from deconvd.lending.protocol import LendingReply, ReplyStatus
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import chunk_to_bytes
from deconvd.wire.status import status_from_error
from deconvd_client import Connection, DeconvdError
from tests.fuzz.case import Case, Part, Seed
from tests.fuzz.decoders import server_info
from tests.fuzz.hostile_server import SLOTS, HostileServer
from tests.fuzz.target import Target
from tests.processes import process_resources, wait_until
from tests.striped_clients import force_stripes

__all__ = ["Clients", "answer_parts"]

_TIMEOUT_S: Final = 0.2
_FIRST_TIMEOUT_S: Final = 30.0
"""That of undamaged calls at first, which must get through on a busy machine."""

_LEDGER: Final = b"queue_us=1;compute_us=31;server_us=64"
_X = np.ones((4, 1, 8, 8), np.float32)
_W = np.ones((1, 1, 1, 1), np.float32)
_LARGE = np.ones((4, 1, 160, 160), np.float32)
"""Operands and results of this size are a stream, or striped, on a direct connection."""

_SPARE_BYTES: Final = 300 << 20


def _described(shape: tuple[int, ...]) -> pb.Tensor:
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=shape)


def _whole(array: Any) -> pb.Tensor:
    message = _described(array.shape)
    message.raw = array.tobytes()
    return message


def _deconvolve(F: Connection) -> None:
    y = F.deconvolution_2d(_X, _W)
    assert (y.shape, y.dtype) == (_X.shape, _X.dtype)


def _grad(F: Connection) -> None:
    gx, gW, _ = F.deconvolution_2d_grad(_X, _W, None, _X)
    assert gx is not None
    assert gW is not None
    assert (gx.shape, gW.shape) == (_X.shape, _W.shape)


def _deconvolve_large(F: Connection) -> None:
    y = F.deconvolution_2d(_LARGE, _W)
    assert (y.shape, y.dtype) == (_LARGE.shape, _LARGE.dtype)


def _use_residents(F: Connection) -> None:
    with F.put(_X) as x:
        assert x.numpy().shape == _X.shape
        assert F.remote.deconvolution_2d(x, _W).shape == _X.shape


def _ask(F: Connection) -> None:
    assert repr(F.server_info())
    assert F.last_ledger is not None
    assert F.health()


def _use_memory(F: Connection) -> None:
    x = F.empty(_LARGE.shape, np.float32)
    x[...] = 1
    assert F.deconvolution_2d(x, _W).shape == x.shape


_OPERATIONS: Final[dict[str, tuple[str, Callable[[Connection], None]]]] = {
    "message": ("grpc", _deconvolve),
    "gradients": ("grpc", _grad),
    "stream": ("grpc", _deconvolve_large),
    "residents": ("grpc", _use_residents),
    "questions": ("grpc", _ask),
    "tcp": ("auto", _deconvolve),
    "direct": ("unix", _deconvolve),
    "direct_stream": ("unix", _deconvolve_large),
    "direct_residents": ("unix", _use_residents),
    "striped": ("unix", _deconvolve_large),
    "memory": ("shared_memory", _use_memory),
}


def answer_parts(**changes: Part) -> list[Part]:
    """Return answers as they should be, in the order of `SLOTS`."""
    instance = bytes(range(16))
    whole = pb.DeconvolveResponse(y=_whole(_X))
    header = pb.DeconvolveStreamResponse(header=pb.DeconvolveResponse(y=_described(_LARGE.shape)))
    resident = pb.Resident(handle=instance)
    answers: dict[str, Part] = {
        "GetServerInfo": server_info(),
        "Deconvolve": whole,
        "DeconvolveGrad": pb.DeconvolveGradResponse(gx=_whole(_X), gw=_whole(_W)),
        "DeconvolveStream": header,
        "chunk": chunk_to_bytes(_LARGE.tobytes()),
        "HoldSession": pb.HoldSessionResponse(
            session=instance, lease_s=30, quota_bytes=1 << 20, can_remember=True
        ),
        "PutTensor": pb.PutTensorResponse(resident=resident),
        "GetTensor": pb.GetTensorResponse(header=_described(_X.shape)),
        "health": health_pb2.HealthCheckResponse(status=1),
        "ledger": _LEDGER,
        "failure": b"",
        "hello": Hello(instance).pack(),
        "answer": Answer(whole.SerializeToString(), _LEDGER.decode(), 4).pack(),
        "stripe": b"",
        "identity": LendingReply(ReplyStatus.DONE, 0, instance).pack(),
        "loan": LendingReply(ReplyStatus.DONE, 0, bytes(range(16, 32))).pack(),
        "descriptor": b"\0",
    }
    assert tuple(answers) == SLOTS
    return [*{**answers, **changes}.values()]


def _frames(*messages: Message) -> bytes:
    """Return a streamed response as frames."""
    return b"".join(MessagePart(message.SerializeToString()).pack() for message in messages)


def _seeds() -> Iterator[Seed]:
    kept = pb.DeconvolveResponse(y=pb.Tensor(resident=pb.Resident(handle=bytes(16))))
    chunk = chunk_to_bytes(_X.tobytes())
    for kind in ("message", "gradients", "stream", "questions", "tcp", "direct"):
        yield Seed(kind, answer_parts(), is_list=False)
    yield Seed("residents", answer_parts(chunk=chunk, Deconvolve=kept), is_list=False)
    for error in (
        LostTensorError("x is lost", argument="x"),
        InvalidArgumentError("stride must be positive", argument="stride"),
        UnavailableError("busy", retry_after_s=60.0),
    ):
        status = status_from_error(error)
        for kind in ("message", "residents", "questions"):
            yield Seed(kind, answer_parts(failure=status), is_list=False)
        failed = pack_frame(FrameKind.FAILED, status.SerializeToString())
        yield Seed("direct", answer_parts(answer=failed), is_list=False)
    assert isinstance(status, status_pb2.Status)
    elements = pack_frame(FrameKind.ELEMENTS, _LARGE.tobytes())
    end = EndOfStream(_LEDGER.decode()).pack()
    header = pb.DeconvolveStreamResponse(header=pb.DeconvolveResponse(y=_described(_LARGE.shape)))
    yield Seed(
        "direct_stream", answer_parts(answer=_frames(header) + elements + end), is_list=False
    )
    put = pb.PutTensorResponse(resident=pb.Resident(handle=bytes(16)))
    yield Seed("direct_residents", answer_parts(answer=_frames(put) + end), is_list=False)
    described = pb.DeconvolveResponse(y=_described(_LARGE.shape))
    yield Seed(
        "striped",
        answer_parts(
            answer=Answer(described.SerializeToString(), _LEDGER.decode(), 4).pack(),
            stripe=PieceHead(0).pack() + elements + EndOfStream().pack(),
        ),
        is_list=False,
    )
    placed = pb.DeconvolveResponse(y=_described(_LARGE.shape))
    placed.y.shared.region = bytes(range(16, 32))
    frame = Answer(placed.SerializeToString(), _LEDGER.decode()).pack()
    for number in range(6):
        changes: dict[str, Part] = {"Deconvolve": placed, "answer": frame}
        yield Seed("memory", answer_parts(**changes, descriptor=bytes([number])), is_list=False)


class Clients(Target):
    """Calls to a hostile server, by every way."""

    seeds = (*_seeds(),)
    batch_count = 200
    limit_s = 8.0
    bounded_count = 100
    share = 1

    def open(self, stack: ExitStack) -> None:
        self._strays: list[Exception] = []
        self._server = stack.enter_context(HostileServer(self.directory))
        self._patch = stack.enter_context(pytest.MonkeyPatch.context())
        self._timeout_s = _FIRST_TIMEOUT_S
        self._patch.setattr(threading, "excepthook", self._note_stray)
        self._patch.setattr(sys, "unraisablehook", self._note_stray)
        # what is loaded and kept at the first calls is not a leak
        for seed in {seed.kind: seed for seed in reversed(self.seeds)}.values():
            self.feed(seed.to_case())
        self._timeout_s = _TIMEOUT_S
        missing = {"grpc", "CALL", "STRIPE", "LEND"} - set(self._server.counts)
        assert not missing, f"no undamaged call went by {missing}"
        self._before = process_resources(os.getpid())

    def feed(self, case: Case) -> None:
        self._server.answers = dict(zip(SLOTS, case.parts, strict=True))
        transport, operate = _OPERATIONS[case.kind]
        with self._patch.context() as patch:
            force_stripes(patch, 2 if case.kind == "striped" else 0)
            for name in ("striped_transport._PATIENCE_S", "pool._CONNECT_PATIENCE_S"):
                patch.setattr(f"deconvd_client.transports.direct.{name}", 0.3)
            patch.setattr("deconvd_client.dispatch._MAX_UNARY_BYTES", _LARGE.nbytes)
            target = f"unix:{self._server.path}"
            if case.kind == "tcp":
                target = f"127.0.0.1:{self._server.port}"
            with deconvd_client.connect(
                target, timeout_s=self._timeout_s, fail_fast=True, transport=transport
            ) as F:
                with suppress(DeconvdError), F.ledgers():
                    operate(F)

    def _note_stray(self, stray: Any) -> None:
        """Note an error of a background thread, which no caller gets."""
        self._strays.append(stray.exc_value)

    def check(self) -> None:
        if self._strays:
            raise self._strays.pop()
        wait_until(self._has_given_back)

    def _has_given_back(self) -> bool:
        before, now = self._before, process_resources(os.getpid())
        return (
            now.memory_bytes <= before.memory_bytes + _SPARE_BYTES
            and now.threads_count <= before.threads_count + 8
            and now.descriptors_count <= before.descriptors_count + 8
        )
