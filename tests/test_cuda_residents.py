"""Tensors that stay on a card, and in the host's memory when the card has no room for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from deconvd.errors import LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.messages import message_from_geometry
from tests.servers import ServerProcess, server_process
from tests.session_clients import (
    SessionClient,
    array_of,
    open_session,
    raw_tensor,
    tensor_by_handle,
)

pytestmark = pytest.mark.gpu

MIB = 1 << 20
CARD_MIB, HOST_MIB = 6, 4


@pytest.fixture
def small(socket_directory: Path) -> Iterator[ServerProcess]:
    """A server that keeps little on its card, and less beneath it."""
    options = ["--resident-memory-bytes", str(CARD_MIB * MIB)]
    options += ["--spill-memory-bytes", str(HOST_MIB * MIB)]
    with server_process(socket_directory, *options, device="cuda:0") as running:
        yield running


def image(value: float) -> Array:
    """Return a mebibyte."""
    return np.full((1, 1, 512, 512), value, np.float32)


def kept(held: SessionClient) -> dict[str, int]:
    """Return how many tensors are kept on the card, and how many in host memory."""
    (device,) = held.info().devices
    return {cache.name: cache.count for cache in device.caches if "resident" in cache.name}


def scaled(held: SessionClient, x: Array, handle: bytes) -> Array:
    """Return three times what is kept, as the card computes it."""
    w = raw_tensor(np.full((1, 1, 1, 1), 3, np.float32))
    request = pb.DeconvolveRequest(x=tensor_by_handle(x, handle), w=w, session=held.session)
    return array_of(held.stub.Deconvolve(request).y)


def test_what_the_card_has_no_room_for_is_used_as_if_it_had(small: ServerProcess) -> None:
    with open_session(small.target) as held:
        images = [image(number) for number in range(CARD_MIB + HOST_MIB)]
        handles = [held.put(x) for x in images]
        assert kept(held) == {
            "resident tensors": CARD_MIB,
            "resident tensors in host memory": HOST_MIB,
        }

        for _ in range(3):
            for x, handle in zip(images, handles, strict=True):
                np.testing.assert_array_equal(scaled(held, x, handle), 3 * x)
                np.testing.assert_array_equal(held.get(handle), x)
        assert sum(kept(held).values()) == CARD_MIB + HOST_MIB


def test_what_nothing_has_room_for_is_lost_and_said(small: ServerProcess) -> None:
    with open_session(small.target, b"key") as held, open_session(small.target, b"key") as later:
        x = image(1)
        handles = [held.put(x) for _ in range(CARD_MIB + HOST_MIB + 2)]

        for handle in handles[:2]:
            with pytest.raises(grpc.RpcError) as failure:
                scaled(held, x, handle)
            error: Any = error_from_rpc(failure.value)
            assert isinstance(error, LostTensorError)
        np.testing.assert_array_equal(held.get(handles[2]), x)

        held.close()
        assert sum(kept(later).values()) == 0


def test_a_W_that_stays_gives_the_bits_of_one_that_is_sent_and_takes_no_more_in_use(
    small: ServerProcess,
) -> None:
    rng = np.random.default_rng(0)
    geometry = message_from_geometry(Geometry(stride=(2, 2), pad=(1, 1)))
    x = rng.standard_normal((4, 32, 12, 10)).astype(np.float16)
    w = rng.standard_normal((32, 16, 4, 4)).astype(np.float16)
    options = pb.Options(cudnn_deterministic=True)
    with open_session(small.target) as held:
        handle = held.put(w)

        def y(message: pb.Tensor) -> Array:
            request = pb.DeconvolveRequest(
                x=raw_tensor(x), w=message, geometry=geometry, options=options, session=held.session
            )
            return array_of(held.stub.Deconvolve(request).y)

        expected = y(raw_tensor(w))
        before_bytes = held.resident_bytes()
        for _ in range(5):
            np.testing.assert_array_equal(y(tensor_by_handle(w, handle)), expected)
        assert held.resident_bytes() == before_bytes >= w.nbytes

        held.drop(handle)
        assert held.resident_bytes() == 0
