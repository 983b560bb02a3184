"""The bare program beside `benchmarks.cards`: processes that move bytes to cards and back, and compute nothing.

A client gives it memory that both map. For each call the client may copy its operands there; the process then moves
them to the card, and as many bytes as the result has back, on a stream of the client's own. Both say so by one byte
over a socket. On the processor, a copy in memory stands for each of these moves.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["bare_cards", "bare_transfers"]

_SIZES: Final = struct.Struct("<QQ")
"""How many bytes a call moves to the card, and how many back. The latter begin at the next page of the memory."""

_GO: Final = b"."
_START_S: Final = 60.0
_START_POLL_S: Final = 0.02


@contextmanager
def bare_cards(devices: Sequence[str]) -> Iterator[list[str]]:
    """Run a process for each device for the block, and give the paths of their sockets.

    Args:
        devices: ``cuda:N`` or ``cpu``, which may be given several times.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder, ExitStack() as stack:
        paths = [f"{folder}/{number}.sock" for number in range(len(devices))]
        for device, path in zip(devices, paths, strict=True):
            process = context.Process(target=_serve, args=(device, path), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        for path in paths:
            _wait_for(path)
        yield paths


@contextmanager
def bare_transfers(
    path: str, operands: Sequence[Array], result_bytes: int
) -> Iterator[tuple[list[Array], Callable[[], None]]]:
    """Connect to a process, and give arrays like the operands in memory that both map, and what makes a call."""
    sent_bytes = sum(array.nbytes for array in operands)
    size_bytes = _whole_pages(sent_bytes) + result_bytes
    descriptor = os.memfd_create("bare")
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, size_bytes)
        memory = mmap.mmap(descriptor, size_bytes)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(path)
        socket.send_fds(connection, [_SIZES.pack(sent_bytes, result_bytes)], [descriptor])

        def call() -> None:
            connection.sendall(_GO)
            if not connection.recv(1):
                raise ConnectionError("the bare program has ended")

        places, offset = [], 0
        for array in operands:
            place = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
            places.append(place)
            offset += array.nbytes
        yield places, call


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _wait_for(path: str) -> None:
    end_s = time.monotonic() + _START_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(path)
            return
        if time.monotonic() > end_s:
            raise TimeoutError("the bare program does not start")
        time.sleep(_START_POLL_S)


def _serve(device: str, path: str) -> None:
    """Serve clients, each in a thread, until the process is killed."""
    moves: Callable[[memoryview, int, int], Any] = _host_moves
    if device.startswith("cuda"):
        moves = _card_moves(int(device.partition(":")[2]))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve_client, args=(connection, moves), daemon=True).start()


def _serve_client(connection: socket.socket, moves: Callable[[memoryview, int, int], Any]) -> None:
    with connection:
        head, descriptors, _, _ = socket.recv_fds(connection, _SIZES.size, 1)
        if not head:  # it has looked whether there is anybody
            return
        sent_bytes, result_bytes = _SIZES.unpack(head)
        memory = mmap.mmap(descriptors[0], 0)
        os.close(descriptors[0])
        with moves(memoryview(memory), sent_bytes, result_bytes) as move:
            while connection.recv(1):
                move()
                with suppress(BrokenPipeError):
                    connection.send(_GO)


@contextmanager
def _host_moves(
    memory: memoryview, sent_bytes: int, result_bytes: int
) -> Iterator[Callable[[], None]]:
    there, back = np.empty(sent_bytes, "u1"), np.ones(result_bytes, "u1")
    sent = np.frombuffer(memory, "u1", sent_bytes)
    result = np.frombuffer(memory, "u1", result_bytes, _whole_pages(sent_bytes))

    def move() -> None:
        np.copyto(there, sent)
        np.copyto(result, back)

    yield move


def _card_moves(ordinal: int) -> Callable[[memoryview, int, int], Any]:
    """Return what moves bytes to and from a card, which is opened now."""
    import cupy
    from cupy.cuda import runtime

    runtime.setDevice(ordinal)
    runtime.free(0)  # makes the context

    @contextmanager
    def moves(
        memory: memoryview, sent_bytes: int, result_bytes: int
    ) -> Iterator[Callable[[], None]]:
        address = np.frombuffer(memory, "u1").ctypes.data
        with cupy.cuda.Device(ordinal):
            runtime.hostRegister(address, memory.nbytes, 0)
            stream = cupy.cuda.Stream(non_blocking=True)
            sent, result = cupy.empty(sent_bytes, "u1"), cupy.empty(result_bytes, "u1")
            back = address + _whole_pages(sent_bytes)

            def move() -> None:
                runtime.memcpyAsync(
                    sent.data.ptr, address, sent_bytes, runtime.memcpyHostToDevice, stream.ptr
                )
                runtime.memcpyAsync(
                    back, result.data.ptr, result_bytes, runtime.memcpyDeviceToHost, stream.ptr
                )
                stream.synchronize()

            try:
                yield move
            finally:
                runtime.hostUnregister(address)

    return moves
