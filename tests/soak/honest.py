"""Honest clients: each calls by one way until SIGTERM, and says then how it fared.

``python -m tests.soak.honest WAY PATH PORT DIRECT_PORT SEED`` prints a line once it has been served, and at the end an
`Outcome` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from random import Random
from threading import Event
from typing import Any, Protocol, TypeVar

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import Answer, CallFailure, MethodCode
from deconvd.direct.frame_stream import FrameStream
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    UnavailableError,
)
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.status import error_from_status
from deconvd_client import Connection
from tests import definition
from tests.direct_calls import REQUEST, W, X, receive_answer, send_call
from tests.servers import only_server
from tests.session_clients import array_of
from tests.soak.cases import Case, chainers, large, small
from tests.soak.places import NICENESS, Interval, Places, end_at_sigterm, open_stream
from tests.striped_clients import force_stripes
from tests.test_stock_client import (
    assert_are_gradients,
    assert_is_y,
    backward,
    forward,
    forward_parts,
    tensor,
)

__all__ = ["BARE_WAYS", "CALL_TIMEOUT_S", "TOLD_BY_GRPC", "WAYS", "Failure", "Outcome"]

CALL_TIMEOUT_S = 30.0
"""How long a call may take: longer than the server is away."""

TOLD_BY_GRPC = "Cancelling all calls"
"""What the server's gRPC says by itself to calls that a drain cuts short: with UNAVAILABLE, as of a connection that
broke, so that a client may try again, though not that it was the server that ended the call, and not when to.
"""

_PAUSE_S = 0.05
"""The most between two calls: all honest clients together leave processors to the server."""

_LARGE = (4, 4, 128, 128), (10, 4, 160, 160)
"""What is in shared memory or a message, and in shared memory or a stream."""

_EARLY = (10, 4, 230, 230)
"""What is called with before it is copied to shared memory."""

_STRIPED = 20, 4, 170, 170
"""What is striped: three pieces there, and three back."""

_STRIPES_COUNT = 3

_WIDE = np.random.default_rng(0).integers(-1, 2, (64, 64, 4, 4)).astype(np.float32)
"""A filter that is sent only if the server lacks what it holds."""

_HESITATION_S = 0.2
"""Between the messages of a stream by the stock client: it is served within the drain's timeout all the same."""

_NEWCOMERS = 0.1
"""The share of calls that are made by clients that have just come."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class Failure:
    """A call, or a try of one, that failed.

    Attributes:
        when: From its begin to its end.
        is_last: Whether the caller has given the call up; else it was tried again.
        was_told: Whether the server said so, rather than that the connection broke.
    """

    when: Interval
    kind: str
    text: str
    is_last: bool
    was_told: bool


@dataclass
class Outcome:
    """How the calls of a way went.

    Attributes:
        slowest: The call that took longest, its tries together.
        wrong: What was wrong with results.
        answered: When calls began that were answered, and when they ended.
    """

    way: str
    slowest: Interval = (0.0, 0.0)
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    answered: list[Interval] = field(default_factory=list)

    def note_end(self, began_s: float) -> None:
        """Note that a call that began then has ended, somehow."""
        begin, end = self.slowest
        now_s = time.monotonic()
        if now_s - began_s > end - begin:
            self.slowest = began_s, now_s

    @classmethod
    def of(cls, text: str) -> Outcome:
        """Return what was printed."""
        fields = json.loads(text)
        failures = [Failure(**failure) for failure in fields.pop("failures")]
        return cls(failures=failures, **fields)  # intervals are lists now, which is no matter


class _Client(Protocol):
    """Who calls."""

    def call(self, random: Random) -> None:
        """Make one call. Raises AssertionError if a result is wrong."""

    def close(self) -> None:
        """Close its connection."""


class _Library:
    """Our client, by one transport."""

    def __init__(self, target: str, transport: str, *shapes: tuple[int, int, int, int]) -> None:
        self.F = deconvd_client.connect(target, transport=transport, timeout_s=CALL_TIMEOUT_S)
        self.close = self.F.close
        self._large = _large_cases(*shapes)

    def call(self, random: Random) -> None:
        case = random.choice(random.choice([self._large, _small_cases()]))
        if random.random() < 0.5:
            case.check_y(self.F.deconvolution_2d(case.x, case.W, case.b, **case.params))
        else:
            arrays = case.x, case.W, case.b, case.gy
            case.check_gradients(*self.F.deconvolution_2d_grad(*arrays, **case.params))


def _make_overlapped_client(places: Places) -> _Library:
    """Return a client whose large calls begin before their arrays are copied, though the processor follows no copy."""
    client = _Library(places.unix, "auto", _EARLY)
    direct = only_server(client.F).route.target_stub.direct
    assert direct is not None
    pytest.MonkeyPatch().setattr(direct._overlap_backoff, "is_due", lambda: True)
    return client


def _make_striped_client(places: Places) -> _Library:
    """Return a client whose large calls are striped, though that does not pay on a machine of few processors."""
    force_stripes(pytest.MonkeyPatch(), _STRIPES_COUNT)
    return _Library(places.tcp, "tcp", _STRIPED)


class _Residents:
    """Our client with tensors that stay, which the server may lose: its arrays do not change."""

    def __init__(self, target: str, tenant_key: str) -> None:
        self.F: Connection = deconvd_client.connect(
            target, tenant_key=tenant_key, timeout_s=CALL_TIMEOUT_S
        )
        self.close = self.F.close

    def call(self, random: Random) -> None:
        F, case = self.F, random.choice([*_small_cases(), *_large_cases(_LARGE[0])])
        match random.randrange(4):
            case 0:
                with F.put(case.W) as kept:
                    case.check_y(F.deconvolution_2d(case.x, kept, case.b, **case.params))
            case 1:
                with F.remote.deconvolution_2d(case.x, case.W, case.b, **case.params) as there:
                    case.check_y(there.numpy())
            case 2:
                y, pullback = F.vjp(case.x, case.W, case.b, **case.params)
                case.check_y(y)
                case.check_gradients(*pullback(case.gy))
            case _:
                ones = np.ones((2, _WIDE.shape[0], 1, 1), np.float32)
                sums = np.stack([_WIDE.sum(axis=0)] * 2)
                np.testing.assert_array_equal(F.deconvolution_2d(ones, _WIDE), sums)


@cache
def _small_cases() -> list[Case]:
    return [*small(np.random.default_rng(0)), *chainers()]


@cache
def _large_cases(*shapes: tuple[int, int, int, int]) -> list[Case]:
    return list(large(np.random.default_rng(0), *shapes))


class _Stock:
    """The generated client of the schema, which makes no retries and has no timeouts."""

    def __init__(self, places: Places) -> None:
        soon = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        soon += [("grpc.use_local_subchannel_pool", 1)]  # or it would share others' connections
        channel = grpc.insecure_channel(places.tcp, soon)
        self.close = channel.close
        self._stub = pb_grpc.DeconvolutionServiceStub(channel)

    def call(self, random: Random) -> None:
        try:
            random.choice([self._deconvolve, self._differentiate, self._stream])()
        except grpc.RpcError as failure:
            call: Any = failure  # its stubs do not say so
            raise error_from_rpc(call) from None

    def _deconvolve(self) -> None:
        assert_is_y(self._stub.Deconvolve(forward(tensor), timeout=CALL_TIMEOUT_S))

    def _differentiate(self) -> None:
        request = backward(tensor)
        assert_are_gradients(self._stub.DeconvolveGrad(request, timeout=CALL_TIMEOUT_S))

    def _stream(self) -> None:
        requests = _hesitant(forward_parts())
        parts = self._stub.DeconvolveStream(requests, timeout=CALL_TIMEOUT_S)
        first, *rest = parts
        first.header.y.raw = b"".join(part.chunk for part in rest)
        assert_is_y(first.header)


def _hesitant(messages: Iterable[_T]) -> Iterator[_T]:
    """Yield messages with pauses, so that a call is under way at most SIGTERMs."""
    for message in messages:
        yield message
        time.sleep(_HESITATION_S)


class _DirectClient:
    """Direct calls, frame by frame, by a Unix socket or TCP."""

    def __init__(self, places: Places) -> None:
        self._places = places
        problem = Problem(spec_of(X), spec_of(W), Geometry())
        self._y = definition.deconvolve(problem, X, W)
        self._line: FrameStream | None = None

    def call(self, random: Random) -> None:
        line, self._line = self._line, None
        try:
            line = line or open_stream(self._places, is_unix=random.random() < 0.5)
            self._call(line)
        except OSError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        self._line = line

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def _call(self, line: FrameStream) -> None:
        line.set_deadline(CALL_TIMEOUT_S)
        send_call(
            line, MethodCode.Deconvolve, REQUEST.SerializeToString(), timeout_s=CALL_TIMEOUT_S
        )
        event = receive_answer(line)
        if isinstance(event, CallFailure):
            raise error_from_status(event.status)
        assert isinstance(event, Answer)
        response = pb.DeconvolveResponse.FromString(event.message)
        np.testing.assert_array_equal(array_of(response.y), self._y)


WAYS: dict[str, Callable[[Places], _Client]] = {
    "shared_memory": lambda places: _Library(places.unix, "shared_memory", *_LARGE),
    "unix": lambda places: _Library(places.unix, "unix", *_LARGE),
    "tcp": lambda places: _Library(places.tcp, "tcp", *_LARGE),
    "striped": _make_striped_client,
    "grpc": lambda places: _Library(places.tcp, "grpc", *_LARGE),
    "early": _make_overlapped_client,
    "residents": lambda places: _Residents(places.unix, ""),
    "residents_by_tcp": lambda places: _Residents(places.tcp, "a secret of honest clients"),
    "stock": _Stock,
    "lines": _DirectClient,
}


BARE_WAYS = "stock", "lines"
"""Those whose clients make no retries of their own, so that each try is seen."""


def _call_until(end: Event, places: Places, random: Random, outcome: Outcome) -> None:
    client = WAYS[outcome.way](places)
    while not end.wait(random.uniform(0, _PAUSE_S)):
        began_s = time.monotonic()
        try:
            _call(client, random, outcome)
        except AssertionError as wrong:
            outcome.wrong.append(str(wrong))
        outcome.note_end(began_s)
        if random.random() < _NEWCOMERS:
            client.close()
            client = WAYS[outcome.way](places)


def _call(client: _Client, random: Random, outcome: Outcome) -> None:
    """Make a call, and try again for as long as the server says so, where the client does not by itself."""
    until_s = time.monotonic() + CALL_TIMEOUT_S
    while True:
        began_s = time.monotonic()
        try:
            client.call(random)
        except DeconvdError as error:
            when = began_s, time.monotonic()
            is_last = not _may_try_again(outcome.way, error) or time.monotonic() > until_s
            kind = type(error).__name__
            failure = Failure(
                when, kind, str(error), is_last=is_last, was_told=_is_outcome_known(error)
            )
            outcome.failures.append(failure)
            if is_last:
                return
            time.sleep(0.1)  # a server that is killed takes longer to come back
        else:
            outcome.answered.append((began_s, time.monotonic()))
            return


def _may_try_again(way: str, error: DeconvdError) -> bool:
    """Return whether a client has to make a call again by itself.

    The library does that, and goes another way where the server lends no more memory, unless it is told to go no other.
    """
    if way == "shared_memory":
        return isinstance(error, ExhaustedError)
    return way in BARE_WAYS and isinstance(error, UnavailableError)


def _is_outcome_known(error: DeconvdError) -> bool:
    """Return whether the server has told what became of a call."""
    if isinstance(error, UnavailableError):
        return error.was_reached
    return isinstance(error, (CallCancelledError, DeadlineError))


def main() -> None:
    """See the module."""
    way, *words, seed = sys.argv[1:]
    os.nice(NICENESS)
    places, outcome = Places.of(*words), Outcome(way)
    WAYS[way](places).call(Random(seed))
    end = end_at_sigterm()
    _call_until(end, places, Random(seed), outcome)
    sys.stdout.write(json.dumps(asdict(outcome)))
    sys.stdout.flush()
    os._exit(0)  # it has no more to do, and a server that is away would have it wait


if __name__ == "__main__":
    main()
