"""What the server refuses is refused at once, however much the client has to send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import deconvd_client
from deconvd.wire.stream_parts import ElementsPart, elements_parts
from deconvd.wire.tensor import elements_of
from deconvd_client import Connection, ExhaustedError
from tests.servers import ServerProcess, server_process

ONE = np.ones((1, 1, 1, 1), np.float32)
HUGE_SHAPE = (1, 2, 32768, 32768)  # 8 GiB
BOUND_S = 5.0
"""To copy and send 8 GiB takes many seconds; to be told takes a millisecond."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(
        tmp_path_factory.mktemp("server"),
        *("--shared-memory-bytes", "0", "--resident-memory-bytes", "1Gi"),
        listen=("127.0.0.1:0", "unix"),
    ) as running:
        yield running


CALLS: dict[str, Callable[[Connection, np.ndarray], object]] = {
    "y": lambda F, W: F.deconvolution_2d(ONE, W),
    "gradients": lambda F, W: F.deconvolution_2d_grad(ONE, W, None, W),
    "put": lambda F, W: F.put(W),
    "vjp": lambda F, W: F.vjp(ONE, W),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("index", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_gigabytes_are_not_sent_to_a_server_that_has_refused_them(
    server: ServerProcess, transport: str, index: int, call: Callable[..., object]
) -> None:
    W = np.broadcast_to(np.float32(1), HUGE_SHAPE)  # which takes no memory, and must be copied
    with deconvd_client.connect(server.targets[index], transport=transport, timeout_s=60) as F:
        F.deconvolution_2d(ONE, ONE)
        F.put(ONE)
        begun_s = time.monotonic()
        with pytest.raises(ExhaustedError):
            call(F, W)

        assert time.monotonic() - begun_s < BOUND_S
        assert F.deconvolution_2d(ONE, ONE)[0, 0, 0, 0] == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(24, dtype=">f8").reshape(2, 3, 4),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).T,
        np.arange(48, dtype=np.float16)[::2],
        np.broadcast_to(np.float64(3), (5, 1, 7)),
        np.array(3, ">f4"),
        np.empty((0, 3), np.float32),
    ],
    ids=["raw", "big-endian", "transposed", "strided", "broadcast", "scalar", "empty"],
)
@pytest.mark.parametrize("copied_bytes", [8, 16, 40, 1 << 20])
def test_parts_of_any_array_are_its_elements_in_order(
    array: np.ndarray, copied_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd.wire.stream_parts._COPY_BLOCK_BYTES", copied_bytes)

    parts: list[ElementsPart] = [*elements_parts(array)]

    assert b"".join(part.data for part in parts) == bytes(elements_of(array))
