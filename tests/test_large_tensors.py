"""Tensors of more than 2 GiB, there and back, in bounded memory on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from tests.processes import peak_memory_bytes, watch_memory
from tests.servers import server_process

SAMPLES_COUNT = 544
SAMPLE = (16, 256, 256)  # of 4 MiB, so 2.1 GiB in all
TWICE = 2 * np.eye(16, dtype=np.float32)[:, :, None, None]

IN_FLIGHT_BYTES = 600 << 20
"""More than windows of 64 MiB in either direction, of each end, and slices of 8 MiB."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def windows(seed: int) -> Array:
    """Return samples of small whole numbers, each its own, that overlap in memory: they take little of it."""
    step = 256
    numbers = np.random.default_rng(seed).integers(-3, 4, SAMPLES_COUNT * step + (1 << 20))
    shifted = np.lib.stride_tricks.sliding_window_view(numbers.astype(np.float32), 1 << 20)
    return shifted[::step][:SAMPLES_COUNT].reshape(SAMPLES_COUNT, *SAMPLE)


def test_a_tensor_over_two_gibibytes_flows_through(tmp_path: Path) -> None:
    x = windows(0)
    assert x.nbytes > 2 << 30
    with (
        server_process(tmp_path) as server,
        deconvd_client.connect(server.target, timeout_s=250, transport="unix") as F,
    ):
        with watch_memory() as client:
            y = F.deconvolution_2d(x, TWICE)
        server_bytes = peak_memory_bytes(server.process.pid)

    for y_sample, x_sample in zip(y, x, strict=True):
        np.testing.assert_array_equal(y_sample, x_sample * 2)
    assert server_bytes < IN_FLIGHT_BYTES
    assert client.grown_bytes < y.nbytes + IN_FLIGHT_BYTES


def test_gradients_over_two_gibibytes_flow_through(tmp_path: Path) -> None:
    x, gy, b = windows(0), windows(1), np.zeros(16, np.float32)
    with (
        server_process(tmp_path) as server,
        deconvd_client.connect(server.target, timeout_s=250, transport="unix") as F,
    ):
        with watch_memory() as client:
            gx, gW, gb = F.deconvolution_2d_grad(x, TWICE, b, gy)
        server_bytes = peak_memory_bytes(server.process.pid)

    assert gx is not None
    expected_gW, expected_gb = np.zeros((16, 16)), np.zeros(16)
    for gx_sample, x_sample, gy_sample in zip(gx, x, gy, strict=True):
        np.testing.assert_array_equal(gx_sample, gy_sample * 2)
        expected_gW += x_sample.reshape(16, -1) @ gy_sample.reshape(16, -1).T
        expected_gb += gy_sample.sum(axis=(1, 2))
    # sums of whole numbers, below the 2**24 up to which float32 has them all
    assert np.abs(expected_gW).max() < 1 << 24
    np.testing.assert_array_equal(gW, expected_gW[:, :, None, None])
    np.testing.assert_array_equal(gb, expected_gb)
    assert server_bytes < IN_FLIGHT_BYTES
    assert client.grown_bytes < gx.nbytes + IN_FLIGHT_BYTES


def test_a_single_sample_may_have_more_than_two_gibibytes(tmp_path: Path) -> None:
    x = np.broadcast_to(np.arange(8256, dtype=np.float32), (1, 16, 4160, 8256))
    assert x.nbytes > 2 << 30
    with (
        server_process(tmp_path) as server,
        deconvd_client.connect(server.target, timeout_s=250, transport="unix") as F,
    ):
        y = F.deconvolution_2d(x, TWICE)
        peak_bytes = peak_memory_bytes(server.process.pid)

    for y_channel, x_channel in zip(y[0], x[0], strict=True):
        np.testing.assert_array_equal(y_channel, x_channel * 2)
    # the device on the processor sums y in memory of its own
    assert peak_bytes < x.nbytes + 2 * y.nbytes + IN_FLIGHT_BYTES
