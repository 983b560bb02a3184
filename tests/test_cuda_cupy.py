"""Cupy arrays on the server's own card: nothing leaves it, and without that they go by way of the host."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from deconvd_server.daemon import Daemon
from deconvd_server.settings import Settings
from tests.servers import ServerProcess, only_server, server_process

pytestmark = pytest.mark.gpu

cupy: Any = pytest.importorskip("cupy")

TIMEOUT_S = 60
GEOMETRY: dict[str, Any] = {"stride": 2, "pad": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("server"), device="cuda") as running:
        yield running


@pytest.fixture
def F(server: ServerProcess) -> Iterator[Connection]:
    with deconvd_client.connect(server.target) as connection, steady(connection):
        yield connection


def steady(connection: Connection) -> Any:
    return connection.using_config("cudnn_deterministic", True)


def operands(n: int = 3, channels: int = 16, image: int = 24) -> tuple[Array, Array, Array, Array]:
    """Return x, W, b and gy."""
    random = np.random.default_rng(0)
    shapes = [
        (n, channels, image, image),
        (channels, 8, 4, 4),
        (8,),
        (n, 8, 2 * image, 2 * image),
    ]
    x, W, b, gy = (random.standard_normal(shape, np.float32) for shape in shapes)
    return x, W, b, gy


def is_lent(F: Connection, array: Any) -> bool:
    """Return whether an array lies in memory that the server lends."""
    dispatcher = only_server(F)._card_dispatcher
    assert dispatcher is not None
    borrowers = dispatcher._borrowers.values()
    return any(borrower.locate(array) is not None for borrower in borrowers)


@pytest.mark.parametrize(("n", "image"), [(1, 24), (23, 96)], ids=["small", "large"])
def test_a_cupy_array_gives_a_cupy_array_with_the_same_bits(
    F: Connection, n: int, image: int
) -> None:
    x, W, b, _ = operands(n, image=image)
    expected = F.deconvolution_2d(x, W, b, **GEOMETRY)

    for _ in range(4):
        y = F.deconvolution_2d(*map(cupy.asarray, (x, W, b)), **GEOMETRY)

        assert isinstance(y, cupy.ndarray)
        assert is_lent(F, y)
        np.testing.assert_array_equal(cupy.asnumpy(y), expected)


def test_gradients_of_cupy_arrays_are_cupy_arrays(F: Connection) -> None:
    x, W, b, gy = operands()
    expected = F.deconvolution_2d_grad(x, W, b, gy, **GEOMETRY)

    found = F.deconvolution_2d_grad(*map(cupy.asarray, (x, W, b, gy)), **GEOMETRY)

    for array, right in zip(found, expected, strict=True):
        assert isinstance(array, cupy.ndarray)
        assert is_lent(F, array)
        np.testing.assert_array_equal(cupy.asnumpy(array), right)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_element_types_cross_too(F: Connection, dtype: str) -> None:
    x, W, *_ = (array.astype(dtype) for array in operands())
    y = F.deconvolution_2d(cupy.asarray(x), cupy.asarray(W), **GEOMETRY)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(cupy.asnumpy(y), F.deconvolution_2d(x, W, **GEOMETRY))


def test_results_are_of_the_kind_of_x(F: Connection) -> None:
    x, W, *_ = operands()
    expected = F.deconvolution_2d(x, W, **GEOMETRY)

    on_card = F.deconvolution_2d(cupy.asarray(x), W, **GEOMETRY)
    on_host = F.deconvolution_2d(x, cupy.asarray(W), **GEOMETRY)

    assert isinstance(on_card, cupy.ndarray)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(on_card), expected)
    np.testing.assert_array_equal(on_host, expected)


def test_strided_operands_and_views_are_right(F: Connection) -> None:
    x, W, *_ = operands()
    x_card = cupy.asarray(np.ascontiguousarray(x.transpose(3, 2, 1, 0))).transpose(3, 2, 1, 0)
    y = F.deconvolution_2d(x_card, cupy.asarray(W)[:, ::-1], **GEOMETRY)
    expected = F.deconvolution_2d(x, np.ascontiguousarray(W[:, ::-1]), **GEOMETRY)
    np.testing.assert_array_equal(cupy.asnumpy(y), expected)


def test_results_are_operands_of_the_next_call_where_they_lie(F: Connection) -> None:
    x, W, *_ = operands(channels=8)
    expected = F.deconvolution_2d(F.deconvolution_2d(x, W, **GEOMETRY), W, **GEOMETRY)

    y = F.deconvolution_2d(cupy.asarray(x), cupy.asarray(W), **GEOMETRY)
    (borrower,) = only_server(F)._card_dispatcher._borrowers.values()  # type: ignore[union-attr]  # it has one
    taken_bytes = borrower.allocated_bytes
    z = F.deconvolution_2d(y, cupy.asarray(W), **GEOMETRY)

    assert borrower.allocated_bytes - taken_bytes < z.nbytes + x.nbytes  # y was not copied
    np.testing.assert_array_equal(cupy.asnumpy(z), expected)


def test_results_stay_as_they_are_while_they_are_held_and_their_memory_is_used_again(
    F: Connection,
) -> None:
    x, W, *_ = operands(8)
    W_card, held = cupy.asarray(W), []
    for n in range(20):
        held.append((n, F.deconvolution_2d(cupy.asarray(x * n), W_card, **GEOMETRY)[1:3, ::2]))
        if n % 3:
            held.pop(0)
    base = F.deconvolution_2d(x, W, **GEOMETRY)[1:3, ::2]
    for n, y in held:
        np.testing.assert_allclose(cupy.asnumpy(y), n * base, rtol=1e-4, atol=1e-3)
    (borrower,) = only_server(F)._card_dispatcher._borrowers.values()  # type: ignore[union-attr]  # it has one
    del held, y
    gc.collect()
    assert borrower.allocated_bytes < 2 * W_card.nbytes


def test_work_that_is_under_way_on_the_current_stream_is_waited_for(F: Connection) -> None:
    x, W, *_ = operands()
    expected = F.deconvolution_2d(x + 100, W, **GEOMETRY)
    slow = cupy.ones((4096, 4096), np.float32)
    with cupy.cuda.Stream(non_blocking=True):
        x_card = cupy.asarray(x)
        for _ in range(20):
            slow = slow @ slow / 4096
        x_card += slow[0, 0] * 0 + 100
        y = F.deconvolution_2d(x_card, cupy.asarray(W), **GEOMETRY)
    np.testing.assert_array_equal(cupy.asnumpy(y), expected)


def test_memory_that_another_stream_still_reads_is_not_written_by_the_next_call(
    F: Connection,
) -> None:
    x, W, *_ = operands()
    x_card, x_next, W_card = map(cupy.asarray, (x, x + 100, W))
    expected = F.deconvolution_2d(x, W, **GEOMETRY)
    ones = cupy.ones((4096, 4096), np.float32)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)

    def read_late(array: Any) -> Any:
        """Return a copy that is made once the card has done much else."""
        slow = ones
        for _ in range(50):
            slow = slow @ ones / 4096
        return array + slow[0, 0] * 0

    with stream:
        read_late(
            cupy.zeros(expected.shape, np.float32)
        )  # so that nothing has to be allocated below
        stream.synchronize()
        y: Any = F.deconvolution_2d(x_card, W_card, **GEOMETRY)
        address = y.data.ptr
        read = read_late(y)
    del y
    z: Any = F.deconvolution_2d(x_next, W_card, **GEOMETRY)

    assert z.data.ptr == address  # or this proves nothing
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(read), expected)


def test_empty_batches_come_back_as_cupy_arrays(F: Connection) -> None:
    y = F.deconvolution_2d(cupy.ones((0, 8, 4, 4), np.float32), cupy.ones((8, 8, 4, 4), np.float32))
    assert isinstance(y, cupy.ndarray)
    assert y.shape == (0, 8, 7, 7)


def test_wrong_arguments_are_still_told(F: Connection) -> None:
    with pytest.raises(deconvd_client.InvalidArgumentError, match="input channels"):
        F.deconvolution_2d(cupy.ones((1, 8, 4, 4)), cupy.ones((4, 8, 4, 4)))


def falls_back(F: Connection, caplog: pytest.LogCaptureFixture, why: str) -> None:
    x, W, *_ = operands()
    with caplog.at_level(logging.INFO), steady(F):
        expected = F.deconvolution_2d(x, W, **GEOMETRY)
        for _ in range(3):
            y = F.deconvolution_2d(cupy.asarray(x), cupy.asarray(W), **GEOMETRY)
            assert isinstance(y, cupy.ndarray)
            np.testing.assert_allclose(cupy.asnumpy(y), expected, rtol=1e-4, atol=1e-4)
    said = [r.getMessage() for r in caplog.records if "through the host" in r.getMessage()]
    assert len(said) == 1
    assert why in said[0]


def test_a_server_on_the_processor_is_reached_by_way_of_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server_process(tmp_path) as server, deconvd_client.connect(server.target) as F:
        falls_back(F, caplog, "computes on no card")


@pytest.mark.parametrize("transport", ["unix", "shared_memory"])
def test_a_pinned_transport_is_kept_to(server: ServerProcess, transport: str) -> None:
    x, W, *_ = operands()
    with deconvd_client.connect(server.target, transport=transport) as F:
        y = F.deconvolution_2d(cupy.asarray(x), cupy.asarray(W), **GEOMETRY)
        assert isinstance(y, cupy.ndarray)
        assert is_lent(F, y) == (transport == "shared_memory")


def test_a_remote_tensor_and_a_cupy_array_meet_on_the_host(F: Connection) -> None:
    x, W, *_ = operands()
    y = F.deconvolution_2d(cupy.asarray(x), F.put(W), **GEOMETRY)
    assert isinstance(y, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(y), F.deconvolution_2d(x, W, **GEOMETRY))


def test_what_stays_on_the_server_may_be_made_of_cupy_arrays(F: Connection) -> None:
    x, W, b, gy = operands()
    expected = F.deconvolution_2d(x, W, b, **GEOMETRY)
    on_card = [cupy.asarray(array) for array in (x, W, b, gy)]

    np.testing.assert_array_equal(F.put(on_card[0]).numpy(), x)
    y = F.remote.deconvolution_2d(*on_card[:3], **GEOMETRY)
    np.testing.assert_array_equal(y.numpy(), expected)
    gradients = F.remote.deconvolution_2d_grad(*on_card, **GEOMETRY)
    right = F.deconvolution_2d_grad(x, W, b, gy, **GEOMETRY)
    for tensor, array in zip(gradients, right, strict=True):
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_pullback_answers_in_the_kind_of_what_it_is_given(F: Connection) -> None:
    x, W, b, gy = operands()
    y, pullback = F.vjp(*map(cupy.asarray, (x, W, b)), **GEOMETRY)
    expected = F.deconvolution_2d_grad(x, W, b, gy, **GEOMETRY)

    assert isinstance(y, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(y), F.deconvolution_2d(x, W, b, **GEOMETRY))
    for given, kind in ((cupy.asarray(gy), cupy.ndarray), (gy, np.ndarray)):
        for found, right in zip(pullback(given), expected, strict=True):
            assert isinstance(found, kind)
            np.testing.assert_array_equal(cupy.asnumpy(found), right)


def test_gradients_of_a_remote_tensor_are_numpys(F: Connection) -> None:
    x, W, _, gy = operands()
    on_card = cupy.asarray(W), None, cupy.asarray(gy)
    for wanted in (["gx"], ["gx", "gW"]):
        found = F.deconvolution_2d_grad(F.put(x), *on_card, **GEOMETRY, wanted=wanted)
        expected = F.deconvolution_2d_grad(x, W, None, gy, **GEOMETRY, wanted=wanted)
        assert isinstance(found.gx, np.ndarray)
        np.testing.assert_array_equal(found.gx, expected.gx)


@pytest.mark.parametrize("wanted", ["gx", "gW", "gb"])
def test_one_gradient_of_cupy_arrays_is_a_cupy_array(F: Connection, wanted: str) -> None:
    x, W, b, gy = operands()
    expected = getattr(F.deconvolution_2d_grad(x, W, b, gy, **GEOMETRY, wanted=[wanted]), wanted)

    gradients = F.deconvolution_2d_grad(cupy.asarray(x), W, b, gy, **GEOMETRY, wanted=[wanted])

    found = getattr(gradients, wanted)
    assert isinstance(found, cupy.ndarray)
    assert is_lent(F, found)
    np.testing.assert_array_equal(cupy.asnumpy(found), expected)


def test_a_server_in_the_same_process_is_reached_by_way_of_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deconvd_server.device.cuda import open_device

    settings = Settings(
        [f"unix:{tmp_path}/s.sock"], 1 << 30, drain_timeout_s=10, shared_memory_bytes=1 << 30
    )
    daemon = Daemon(settings)
    daemon.serve(lambda: [open_device(0)])
    try:
        with deconvd_client.connect(daemon.addresses[0]) as F:
            falls_back(F, caplog, "cannot be opened here")
            assert daemon.backend is not None
            assert daemon.backend.residents.engines.all[0].load.reserved_bytes == 0
    finally:
        daemon.drain()


CLIENT = """
import sys
import cupy
import numpy as np
import deconvd_client
F = deconvd_client.connect(sys.argv[1])
x = cupy.ones((4, 8, 16, 16), np.float32)
y = F.deconvolution_2d(x, cupy.ones((8, 4, 4, 4), np.float32))
borrower, = F._server.entry._card_dispatcher._borrowers.values()
print(borrower.locate(y) is not None, borrower.borrowed_bytes, flush=True)
input()
"""


def test_what_a_killed_client_had_on_the_card_is_taken_back(tmp_path: Path) -> None:
    """A card that has room for the first regions of two clients, and not of three."""
    limit = ("--device-memory-bytes", str(400 << 20))
    with server_process(tmp_path, *limit, device="cuda") as server:
        assert Path(f"{server.target.removeprefix('unix:')}.memory").is_socket()
        for _ in range(4):
            with subprocess.Popen(
                [sys.executable, "-c", CLIENT, server.target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as client:
                assert client.stdout is not None
                assert client.stdout.readline().split() == ["True", str(64 << 20)]
                client.kill()
