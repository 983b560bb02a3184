"""Every way that tensors go gives the same bits.

The numbers are small and whole, so that every sum is exact in every order and on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import CallHead, MethodCode, StripedCallHead
from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import Connection
from deconvd_client.transports.grpc.transport import GrpcTransport
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.striped_clients import (
    SMALL_PIECES,
    Heads,
    force_stripes,
    shrink_pieces,
    wait_until_direct,
    watch_heads,
)

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

SMALL, LARGE, WIDE = (1, 2, 8, 8), (6, 2, 256, 256), (6, 128, 32, 32)
"""Shapes of x: for one message, for more than there is in one, and for a filter that is offered by its digest."""

_NUMBERS = np.array([-2, -1, 1, 2])
"""Without zero: so no sum is -0 in one order and +0 in another."""


@dataclass(frozen=True)
class Case:
    """Operands, and what comes of them, in float64."""

    x: Array
    W: Array
    b: Array
    gy: Array
    y: Array
    gradients: tuple[Array, Array, Array]


@cache
def case(shape: tuple[int, int, int, int]) -> Case:
    """Return a problem of a filter of 2 x 2 pixels and stride 2, each of whose taps has pixels of y of its own.

    gW and gb are sums of hundreds of thousands of terms of which all but some dozens cancel each other, so that every
    element type holds them: pairs of pixels of x are equal, and of their four pixels of gy two are minus the others.
    """
    random = np.random.default_rng(0)
    n, c_I, h, w = shape
    c_O = c_I
    x = np.repeat(random.choice(_NUMBERS, (n, c_I, h, w // 2)), 2, axis=3).astype(np.float64)
    W = random.choice(_NUMBERS, (c_I, c_O, 2, 2)).astype(np.float64)
    b = random.choice(_NUMBERS, c_O).astype(np.float64)
    halves = random.choice(_NUMBERS, (n, c_O, 2 * h, w // 2, 1, 2))
    gy = np.concatenate([halves, -halves], axis=4).reshape(n, c_O, 2 * h, 2 * w).astype(np.float64)
    for _ in range(40):
        at = random.integers((n, 2 * h, 2 * w))
        gy[at[0], :, at[1], at[2]] += 1
    y = np.tensordot(x, W, (1, 0)).transpose(0, 3, 1, 4, 2, 5).reshape(gy.shape)
    taps = gy.reshape(n, c_O, h, 2, w, 2)
    gx = np.tensordot(taps, W, ((1, 3, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    gW = np.tensordot(x, taps, ((0, 2, 3), (0, 2, 4)))
    return Case(x, W, b, gy, y + b[:, None, None], (gx, gW, gy.sum(axis=(0, 2, 3))))


def is_message(head: CallHead | StripedCallHead) -> bool:
    return head.method in (MethodCode.Deconvolve, MethodCode.DeconvolveGrad)


def operand_of(head: CallHead | StripedCallHead, field: str) -> pb.Tensor:
    """Return an operand in the message of a call that is no stream."""
    types: Mapping[MethodCode, Any] = {
        MethodCode.Deconvolve: pb.DeconvolveRequest,
        MethodCode.DeconvolveGrad: pb.DeconvolveGradRequest,
    }
    tensor: pb.Tensor = getattr(types[head.method].FromString(head.message), field)
    return tensor


def are_messages(heads: Heads) -> bool:
    return all(isinstance(head, CallHead) and is_message(head) for head in heads)


def are_streams(heads: Heads) -> bool:
    return all(isinstance(head, CallHead) and not is_message(head) for head in heads)


def are_striped(stripes_count: int, heads: Heads) -> bool:
    return all(isinstance(h, StripedCallHead) and h.stripes_count == stripes_count for h in heads)


def are_shared(heads: Heads) -> bool:
    return all(is_message(h) and operand_of(h, "x").HasField("shared") for h in heads)


def have_residents(heads: Heads) -> bool:
    calls = [h for h in heads if h.method is not MethodCode.PutTensor]
    return are_striped(2, calls) and all(operand_of(h, "x").HasField("resident") for h in calls)


def have_digests(heads: Heads) -> bool:
    return are_striped(2, heads) and all(operand_of(h, "w").HasField("digest") for h in heads)


@dataclass(frozen=True)
class Way:
    """A way for tensors.

    Attributes:
        transport: That of the client.
        shape: That of x.
        is_taken: Whether calls by direct connections, of which there is at least one, went that way. For gRPC: the
            method of its transport that all calls must use.
        stripes_count: How many stripes the client's large direct calls have, 0 for streams.
        keeps: Whether x and W are put on the server before.
        is_learnt: Whether it is taken from some call on.
    """

    transport: str
    shape: tuple[int, int, int, int]
    is_taken: Callable[[Heads], bool] | str
    stripes_count: int = 0
    keeps: bool = False
    is_learnt: bool = False


WAYS = {
    "message": Way("tcp", SMALL, are_messages),
    "stream": Way("tcp", LARGE, are_streams),
    "striped-2": Way("tcp", LARGE, lambda heads: are_striped(2, heads), 2),
    "striped-4": Way("tcp", LARGE, lambda heads: are_striped(4, heads), 4),
    "striped-8": Way("tcp", LARGE, lambda heads: are_striped(8, heads), 8),
    "grpc-message": Way("grpc", SMALL, "unary"),
    "grpc-stream": Way("grpc", LARGE, "stream"),
    "shared-memory": Way("shared_memory", LARGE, are_shared),
    "unix-message": Way("unix", SMALL, are_messages),
    "unix-stream": Way("unix", LARGE, are_streams),
    "residents": Way("tcp", LARGE, have_residents, 2, keeps=True),
    "digests": Way("tcp", WIDE, have_digests, 2, is_learnt=True),
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def near_and_far(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server on each kind of device in turn, at a Unix socket and at TCP."""
    directory = tmp_path_factory.mktemp("server")
    listen = ("unix", "127.0.0.1:0")
    with server_process(
        directory, device=request.param, listen=listen, constants=SMALL_PIECES
    ) as server:
        yield server


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Heads:
    return watch_heads(monkeypatch)


@pytest.fixture
def rpcs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the transport for gRPC that have carried an operation's calls."""
    rpcs: list[str] = []

    def note(name: str) -> None:
        carry = getattr(GrpcTransport, name)

        def note_and_carry(transport: GrpcTransport, *args: Any) -> Any:
            if (
                args[0] != "GetServerInfo"
            ):  # which is asked for once the link seems slow, say on a busy machine
                rpcs.append(name)
            return carry(transport, *args)

        monkeypatch.setattr(GrpcTransport, name, note_and_carry)

    note("unary")
    note("stream")
    return rpcs


def is_next_taken(
    F: Connection, is_taken: Callable[[Heads], bool], heads: Heads, x: Array, W: Array
) -> bool:
    """Make a call, and return whether it went the way."""
    heads.clear()
    F.deconvolution_2d(x, W, None, 2)
    return bool(heads) and is_taken(heads)


def assert_same(result: Array | None, expected: Array, dtype: Any) -> None:
    assert result is not None
    assert result.dtype == dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(result).view(np.uint8),
        np.ascontiguousarray(expected.astype(dtype)).view(np.uint8),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_the_same_bits(
    near_and_far: ServerProcess,
    name: str,
    dtype: Any,
    heads: Heads,
    rpcs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    way = WAYS[name]
    known = case(way.shape)
    arrays = [array.astype(dtype) for array in (known.x, known.W, known.b, known.gy)]
    target = near_and_far.targets[way.transport in ("tcp", "grpc")]
    force_stripes(monkeypatch, way.stripes_count)
    shrink_pieces(monkeypatch)

    with deconvd_client.connect(target, transport=way.transport) as F:
        if callable(way.is_taken):
            wait_until_direct(F, heads)
        x, W, b, gy = arrays
        images, filters = (F.put(x), F.put(W)) if way.keeps else (x, W)
        if callable(way.is_taken) and way.is_learnt:
            wait_until(partial(is_next_taken, F, way.is_taken, heads, x, W))
        heads.clear()
        rpcs.clear()
        y = F.deconvolution_2d(images, filters, b, 2)
        gradients = F.deconvolution_2d_grad(images, filters, b, gy, 2)

    assert_same(y, known.y, dtype)
    for gradient, expected in zip(gradients, known.gradients, strict=True):
        assert_same(gradient, expected, dtype)
    if isinstance(way.is_taken, str):
        assert not heads
        assert rpcs == [way.is_taken] * 2
    else:
        assert heads
        assert way.is_taken(heads)
