"""Calls on slow links: a server in another network namespace, to which a link of a bounded rate leads."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

import deconvd_client
from benchmarks.links.namespaces import Link, linked_namespace
from benchmarks.links.rows import LinkRow
from benchmarks.transport.servers import LENGTH
from deconvd.model.dtypes import Array

__all__ = ["slow_rows"]

_RATES_GBIT: Final = (1.0, 0.1)
_TRANSPORTS: Final = ("tcp", "grpc")
_WARM_UPS: Final = 2
_MIN_CALLS_COUNT: Final = 3
_DURATION_S: Final = 2.0
"""For how long a kind of call is repeated, at least."""


@dataclass(frozen=True)
class _Load:
    """What is sent, and what comes back: y is the first channel of x.

    Attributes:
        samples_count: The samples of x.
        sample_bytes: The size of each.
        channels_count: The channels of x. y has one.
        is_rectified: Whether x comes from a ReLU: half of its elements are zero.
    """

    samples_count: int
    sample_bytes: int
    channels_count: int = 1
    is_rectified: bool = False

    @property
    def size_bytes(self) -> int:
        return self.samples_count * self.sample_bytes

    @property
    def name(self) -> str:
        megabytes = self.size_bytes / 1e6
        zeros = ", half zeros" if self.is_rectified else ""
        back = megabytes / self.channels_count
        return f"{megabytes:.0f} + {back:.0f} MB, {self.samples_count} samples{zeros}"

    def x(self) -> Array:
        generator = np.random.default_rng(0)
        width = self.sample_bytes // (256 * self.channels_count)
        x = generator.standard_normal(
            (self.samples_count, self.channels_count, 64, width), np.float32
        )
        return np.maximum(x, 0) if self.is_rectified else x

    def W(self) -> Array:
        return np.eye(self.channels_count, 1, dtype=np.float32)[:, :, None, None]


_LOADS: Final = (
    _Load(64, 32 << 10),
    _Load(128, 64 << 10),
    _Load(512, 64 << 10),
    _Load(8, 4 << 20),
    _Load(128, 64 << 10, 4),
    _Load(128, 64 << 10, 4, is_rectified=True),
)


def slow_rows() -> Iterator[LinkRow]:
    """Yield the rows of all loads and transports on links of each rate."""
    for rate_gbit in _RATES_GBIT:
        with (
            linked_namespace(rate_gbit) as link,
            _server(link, "deconvd") as target,
            _server(link, "sink") as sink,
        ):
            for load in _LOADS:
                x, W = load.x(), load.W()
                floor_ms = _median_ms(partial(_send, sink, x))
                for transport in _TRANSPORTS:
                    with deconvd_client.connect(target, transport=transport) as F:
                        np.testing.assert_array_equal(F.deconvolution_2d(x, W), x[:, :1])
                        ms = _median_ms(partial(F.deconvolution_2d, x, W))
                    yield LinkRow(rate_gbit, 0.0, f"{load.name}, {transport}", ms, floor_ms, None)


def _median_ms(call: Callable[[], object]) -> float:
    times_s: list[float] = []
    for _ in range(_WARM_UPS):
        call()
    while len(times_s) < _MIN_CALLS_COUNT or sum(times_s) < _DURATION_S:
        began_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s) * 1e3


@contextmanager
def _server(link: Link, kind: str) -> Iterator[str]:
    """Run one of the servers of `benchmarks.transport` at the far end; give its target."""
    command = [sys.executable, "-m", "benchmarks.transport.servers", kind]
    process = subprocess.Popen(
        link.command([*command, f"{link.server_address}:0"]), stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _send(target: str, x: Array) -> None:
    """Send an array by a bare socket, and return once the other side has all of it."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(LENGTH.pack(x.nbytes))
        connection.sendall(x.data.cast("B"))
        connection.recv(1, socket.MSG_WAITALL)
