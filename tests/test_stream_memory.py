"""Streams for a device with memory of its own: operands arrive, and results leave, where it reaches them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import deconvd_client
from deconvd.host.array_address import address_of
from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.daemon import Daemon
from deconvd_server.device import Device, DeviceInfo, DeviceTensor, Operand, Place
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.settings import Settings

X = np.random.default_rng(0).standard_normal((24, 2, 256, 256)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((2, 3, 3, 3)).astype(np.float32)


class OwnMemoryDevice(CpuDevice):
    """A processor that is taken for a card. Notes which arrays of calls it has allocated itself.

    Attributes:
        are_own: For each large array that it was given: whether it is in memory that it has allocated.
    """

    def __init__(self, *, has_own_memory: bool = True) -> None:
        super().__init__(1)
        self._has_own_memory = has_own_memory
        self._addresses: set[int] = set()
        self.are_own: list[bool] = []

    @property
    def info(self) -> DeviceInfo:
        """See `Device`."""
        return replace(super().info, has_own_memory=self._has_own_memory)

    def allocate_host_array(self, spec: TensorSpec, *, is_lasting: bool = False) -> Array:
        """See `Device`."""
        array = super().allocate_host_array(spec, is_lasting=is_lasting)
        self._addresses.add(address_of(array))
        return array

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> None:
        """See `Device`."""
        for tensor in (*operands.values(), *places.values()):
            if isinstance(tensor, np.ndarray):
                self._note(tensor)
        super().run(operation, problem, operands, places, options, call)

    def write(self, tensor: DeviceTensor, array: Array, call: CallContext) -> None:
        """See `Device`."""
        self._note(array)
        super().write(tensor, array, call)

    def _note(self, array: Array) -> None:
        if array.nbytes >= 1 << 20:
            self.are_own.append(address_of(array) in self._addresses)


@contextmanager
def served(device: Device) -> Iterator[str]:
    """Serve with a device for the block, which is given the address."""
    daemon = Daemon(Settings(["127.0.0.1:0"], 4 << 20, drain_timeout_s=10), [])
    daemon.serve(lambda: [device])
    try:
        yield daemon.addresses[0]
    finally:
        daemon.drain()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_slices_are_in_memory_of_the_device(transport: str) -> None:
    with served(CpuDevice(1)) as address, deconvd_client.connect(address) as plain:
        y = plain.deconvolution_2d(X, W)
        expected = plain.deconvolution_2d_grad(X, W, None, y)
    device = OwnMemoryDevice()
    with (
        served(device) as address,
        deconvd_client.connect(address, transport=transport, timeout_s=60) as F,
    ):
        np.testing.assert_allclose(F.deconvolution_2d(X, W), y, rtol=1e-4, atol=1e-4)
        assert len(device.are_own) >= 4  # x and y of at least two slices
        found = F.deconvolution_2d_grad(X, W, None, y)
        assert found.gx is not None
        assert expected.gx is not None
        np.testing.assert_allclose(found.gx, expected.gx, rtol=1e-4, atol=1e-3)
        assert all(device.are_own)


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_the_result_of_a_message_is_in_memory_of_the_device(transport: str) -> None:
    device, x = OwnMemoryDevice(), np.ones((1, 2, 300, 300), np.float32)
    with (
        served(device) as address,
        deconvd_client.connect(address, transport=transport, timeout_s=60) as F,
    ):
        y = F.deconvolution_2d(x, W)
    assert x.nbytes < 1 << 20 <= y.nbytes  # only y is noted
    assert device.are_own == [True]


def test_a_tensor_that_is_put_arrives_in_memory_of_the_device() -> None:
    device = OwnMemoryDevice()
    with (
        served(device) as address,
        deconvd_client.connect(address, transport="tcp", timeout_s=60) as F,
    ):
        F.put(X).close()
    assert device.are_own
    assert all(device.are_own)


def test_slices_for_a_processor_come_from_the_pools_of_the_server() -> None:
    device = OwnMemoryDevice(has_own_memory=False)
    with (
        served(device) as address,
        deconvd_client.connect(address, transport="tcp", timeout_s=60) as F,
    ):
        F.deconvolution_2d(X, W)
    assert device.are_own
    assert not any(device.are_own)
