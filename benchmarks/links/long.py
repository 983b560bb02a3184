"""Calls on a long link: each byte takes 25 ms to the other end, however many there are."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final

import grpc
import numpy as np

import deconvd_client
from benchmarks.links.delay_proxy import PROXY_HOST, DelayProxy, long_link
from benchmarks.links.rows import LinkRow
from benchmarks.transport.servers import METHOD
from deconvd.host.startup_line import address_in_startup_line
from deconvd.model.dtypes import Array
from deconvd_client import Connection

__all__ = ["long_rows"]

_ROUND_TRIP_S: Final = 0.05
_TRANSPORTS: Final = ("auto", "tcp", "grpc")
_CONNECTIONS_COUNT: Final = 5
"""How many connections are measured, one after the other."""

_CALLS_COUNT: Final = 5
"""How many calls of each kind are measured on a connection."""

_SETTLE_S: Final = 0.5
"""How long a connection is left alone after its first call: direct connections and the session are opened meanwhile."""

_CHANNELS: Final = 362
"""A 1x1 filter of as many channels on both sides has 512 KB."""

_LARGE_BYTES: Final = 8_000_000
_UNLIMITED: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)

_FIRST, _FIRST_W, _LATER, _NEW_W, _SAME_W, _LARGE = (
    "first call",
    "first call, W of 512 KB",
    "later call",
    "new W of 512 KB",
    "W of 512 KB again",
    "8 + 8 MB",
)


def long_rows() -> Iterator[LinkRow]:
    """Yield the rows of all calls and transports on a link with a round trip of 50 ms."""
    floors_ms = _floors_ms()
    with _server(_DECONVD) as server, long_link(server, _ROUND_TRIP_S) as (target, _):
        for transport in _TRANSPORTS:
            times_s: dict[str, list[float]] = {}
            for seed in range(_CONNECTIONS_COUNT):
                with deconvd_client.connect(target, transport=transport) as F:
                    _time_calls(F, seed, times_s)
                with deconvd_client.connect(target, transport=transport) as F:
                    _time(F, _FIRST_W, _small(), _filter(-1 - seed), times_s)
            for what, measured in times_s.items():
                ms = statistics.median(measured) * 1e3
                trips = ms / (_ROUND_TRIP_S * 1e3)
                yield LinkRow(
                    None, _ROUND_TRIP_S * 1e3, f"{what}, {transport}", ms, floors_ms[what], trips
                )


def _time_calls(F: Connection, seed: int, times_s: dict[str, list[float]]) -> None:
    """Make calls of all kinds by a new connection, and add what they take."""
    small = _small()
    one = np.ones((1, 1, 1, 1), np.float32)
    tiny, large = small[:, :1], np.ones((32, 1, 250, 250), np.float32)
    assert large.nbytes == _LARGE_BYTES
    numbers = count(seed << 16)

    def call(what: str, x: Array, W: Array) -> None:
        _time(F, what, x, W, times_s)

    call(_FIRST, tiny, one)
    time.sleep(_SETTLE_S)
    for _ in range(_CALLS_COUNT):
        call(_LATER, tiny, one)
    F.deconvolution_2d(small, _filter(next(numbers)))  # the first large W opens a session
    time.sleep(_SETTLE_S)
    for _ in range(_CALLS_COUNT):
        W = _filter(next(numbers))
        call(_NEW_W, small, W)
        call(_SAME_W, small, W)
    for _ in range(_CALLS_COUNT):
        call(_LARGE, large, one)


def _time(F: Connection, what: str, x: Array, W: Array, times_s: dict[str, list[float]]) -> None:
    began_s = time.perf_counter()
    F.deconvolution_2d(x, W)
    times_s.setdefault(what, []).append(time.perf_counter() - began_s)


def _small() -> Array:
    return np.ones((1, _CHANNELS, 1, 1), np.float32)


def _filter(seed: int) -> Array:
    shape = (_CHANNELS, _CHANNELS, 1, 1)
    return np.random.default_rng(abs(seed)).standard_normal(shape, np.float32)


def _floors_ms() -> dict[str, float]:
    """Return what a bare echo of the same bytes takes by gRPC on such a link."""
    with _server(_ECHO) as server:
        host, _, port = server.rpartition(":")
        proxy = DelayProxy(host, [int(port)], _ROUND_TRIP_S / 2)
        try:
            return _time_echoes(f"{PROXY_HOST}:{port}")
        finally:
            proxy.close()


def _time_echoes(target: str) -> dict[str, float]:
    times_s: dict[str, list[float]] = {}
    W_bytes = _CHANNELS**2 * 4
    for _ in range(_CONNECTIONS_COUNT):
        with grpc.insecure_channel(target, _UNLIMITED) as channel:
            rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            times_s.setdefault(_FIRST, []).append(_duration_s(rpc, b"first"))
            sizes = {_LATER: 100, _NEW_W: W_bytes, _SAME_W: 1600, _LARGE: _LARGE_BYTES}
            for what, size_bytes in sizes.items():
                for _ in range(_CALLS_COUNT):
                    times_s.setdefault(what, []).append(_duration_s(rpc, bytes(size_bytes)))
        with grpc.insecure_channel(target, _UNLIMITED) as channel:
            rpc = channel.unary_unary(METHOD)
            times_s.setdefault(_FIRST_W, []).append(_duration_s(rpc, bytes(W_bytes)))
    return {what: statistics.median(measured) * 1e3 for what, measured in times_s.items()}


def _duration_s(rpc: Callable[[bytes], bytes], data: bytes) -> float:
    began_s = time.perf_counter()
    rpc(data)
    return time.perf_counter() - began_s


_DECONVD: Final = (
    *("deconvd_server", "--device", "cpu"),
    *("--shared-memory-bytes", "0"),  # as if it were on another host
    "--listen",
)
_ECHO: Final = ("benchmarks.transport.servers", "bare_grpc")


@contextmanager
def _server(words: tuple[str, ...]) -> Iterator[str]:
    """Run a server in a process of its own, on TCP alone; give its target."""
    command = [sys.executable, "-m", *words, "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            # ours says more than its target
            yield address_in_startup_line(line) if words == _DECONVD else line.strip()
        finally:
            process.kill()
