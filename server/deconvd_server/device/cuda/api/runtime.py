"""The part of the CUDA runtime that is used here, typed: cards, streams, events, graphs and copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from deconvd.errors import ExhaustedError
from deconvd.lending.protocol import card_id
from deconvd_server.device.cuda.api.cupy_library import CudaError, cuda_runtime, cupy
from deconvd_server.device.cuda.api.driver import (
    DriverError,
    GraphCopy,
    copies_of,
    launch,
    record_event,
)
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.device.native_waits import NativeWaits

__all__ = [
    "Bytes",
    "CardProperties",
    "CudaError",
    "Event",
    "Graph",
    "PinnedBuffer",
    "Stream",
    "card_waits",
    "cards_count",
    "check_card",
    "copy",
    "current_device",
    "download",
    "ipc_handle",
    "open_card",
    "register_host",
    "synchronize",
    "unregister_host",
    "upload",
    "use_device",
]

_T = TypeVar("_T")

_OLDEST_CAPABILITY = 80
"""Compute capability times ten, of Ampere: our kernels use its asynchronous copies to shared memory and its products of
bfloat16 matrices."""

_HOST_REGISTER_PORTABLE = 1
"""`cudaHostRegisterPortable` of cuda_runtime_api.h, for which CuPy has no name: registered for all cards."""

Bytes = npt.NDArray[np.uint8]

_waits_by_card: dict[int, NativeWaits] = {}
"""Of the whole process, since threads wait for streams and events of which no object knows the card."""


def card_waits(ordinal: int) -> NativeWaits:
    """Return the waits for a card."""
    waits = _waits_by_card.get(ordinal)
    # `setdefault` is atomic: two threads that come first get the same object
    return _waits_by_card.setdefault(ordinal, NativeWaits()) if waits is None else waits


def _wait_for_card(function: Callable[..., object], *arguments: object) -> None:
    """Call a function of CUDA that may wait for kernels and copies of the thread's card."""
    card_waits(cuda_runtime.getDevice()).run(function, *arguments)


class CardProperties:
    """A card's name, capability and memory. Reading them starts CUDA on the card.

    Raises:
        DeviceUnavailableError: There is no such card, no driver, or the card is too old.
        CudaError: CUDA cannot be started on it.
    """

    def __init__(self, ordinal: int) -> None:
        count = cards_count()
        if ordinal >= count:
            raise DeviceUnavailableError(
                f"there is no card cuda:{ordinal}: this process can see {count} cards, see nvidia-smi"
            )
        self.ordinal = ordinal
        properties = _properties(ordinal)
        self.name: str = properties["name"].decode()
        self.capability = _capability(properties)
        self.id: bytes = card_id(bytes(properties["uuid"]))
        self.processors_count: int = properties["multiProcessorCount"]
        with current_device(ordinal):
            self.free_bytes, self.memory_bytes = (int(size) for size in cuda_runtime.memGetInfo())


def _properties(ordinal: int) -> Mapping[str, Any]:
    """Return what CUDA tells of a card. Raises DeviceUnavailableError if the card is too old."""
    properties: Mapping[str, Any] = cuda_runtime.getDeviceProperties(ordinal)
    if _capability(properties) < _OLDEST_CAPABILITY:
        raise DeviceUnavailableError(
            f"cuda:{ordinal}, {properties['name'].decode()}, is too old: an Ampere card or a newer one is needed"
        )
    return properties


def _capability(properties: Mapping[str, Any]) -> int:
    return int(properties["major"] * 10 + properties["minor"])


def check_card(ordinal: int) -> None:
    """Raise DeviceUnavailableError if a card cannot be used, as far as can be told without starting CUDA on it."""
    try:
        _properties(ordinal)
    except CudaError as error:
        raise DeviceUnavailableError(f"cuda:{ordinal} cannot be used: {error}") from None


def open_card(ordinal: int) -> CardProperties:
    """Start CUDA on a card and return its properties. Raises DeviceUnavailableError if it cannot be used."""
    try:
        return CardProperties(ordinal)
    except CudaError as error:
        raise DeviceUnavailableError(f"cuda:{ordinal} cannot be used: {error}") from None


def cards_count() -> int:
    """Return how many cards this process can see.

    Raises:
        DeviceUnavailableError: There is no driver, or it is too old.
    """
    try:
        return int(cuda_runtime.getDeviceCount())
    except CudaError as error:
        raise DeviceUnavailableError(
            f"no NVIDIA card can be used ({error}): install NVIDIA's driver, version 580 or newer"
        ) from None


def current_device(ordinal: int) -> AbstractContextManager[object]:
    """Make a card the calling thread's device for the length of a with-block."""
    return _CardContext(ordinal)


class _CardContext(AbstractContextManager[None]):
    """See `current_device`.

    CuPy's own `Device` sets and resets the device each time. This sets it only in a thread that has another one: nearly
    all of ours have theirs already.
    """

    __slots__ = ("_before", "_ordinal")

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal

    def __enter__(self) -> None:
        self._before: int = cuda_runtime.getDevice()
        if self._before != self._ordinal:
            cuda_runtime.setDevice(self._ordinal)

    def __exit__(self, *_: object) -> None:
        if self._before != self._ordinal:
            cuda_runtime.setDevice(self._before)


def use_device(ordinal: int) -> None:
    """Make a card the calling thread's device from now on."""
    cupy.cuda.Device(ordinal).use()


class Event:
    """A point in a stream that others can wait for."""

    def __init__(self, *, timing: bool = False) -> None:
        self._event = cupy.cuda.Event(disable_timing=not timing)

    @property
    def pointer(self) -> int:
        """Its `cudaEvent_t`."""
        return int(self._event.ptr)

    def record(self, stream: int, *, in_graph: bool = False) -> None:
        """Record the event behind all that has been enqueued on a stream.

        Args:
            in_graph: Record it in each launch of the graph that is being captured.
        """
        if in_graph:
            # A plain record in a capture only orders the graph's nodes: nobody outside could read its time.
            _call_driver(record_event, self._event.ptr, stream)
        else:
            cuda_runtime.eventRecord(self._event.ptr, stream)

    def wait(self) -> None:
        """Block until the card has reached the event. Return at once if it was never recorded."""
        _wait_for_card(cuda_runtime.eventSynchronize, self._event.ptr)

    @property
    def is_reached(self) -> bool:
        """Whether the card has reached the event. An error of the card is not raised here, but by `wait`."""
        return bool(cuda_runtime.eventQuery(self._event.ptr) == 0)

    def ms_since(self, start: Event) -> float:
        """Return the milliseconds from another event to this one. Both must have been reached, and have timing."""
        return float(cuda_runtime.eventElapsedTime(start._event.ptr, self._event.ptr))


class Graph:
    """Captured work, launched as one.

    Args:
        graph: The `cudaGraph_t`. This object owns it, and keeps it because copies are known by its nodes.
    """

    def __init__(self, graph: int) -> None:
        self._graph = graph
        destroy = weakref.finalize(self, cuda_runtime.graphDestroy, graph)
        self._executable: int = cuda_runtime.graphInstantiate(graph)
        destroy_executable = weakref.finalize(self, cuda_runtime.graphExecDestroy, self._executable)
        destroy.atexit = destroy_executable.atexit = False  # CUDA may have ended before

    def launch(self, stream: int) -> None:
        """Enqueue the work on a stream. Raises CudaError."""
        _call_driver(launch, self._executable, stream)

    def copies(self) -> list[GraphCopy]:
        """Return the copies that it makes. Raises CudaError."""
        return _call_driver(copies_of, self._graph)

    def retarget_copy(self, copy: GraphCopy, name: str, address: int) -> None:
        """Let later launches copy from or to another address: see `GraphCopy.retarget`. Raises CudaError."""
        _call_driver(copy.retarget, self._executable, name, address)


def _call_driver(function: Callable[..., _T], *arguments: object) -> _T:
    """Call one of the driver's functions; raise its DriverError as CudaError. Both use the same numbers.

    This is no context manager made of a generator: an error that is replaced in one refers to itself. The frames of
    that error, and so a call's arrays, would stay in memory until the garbage collector runs.
    """
    try:
        return function(*arguments)
    except DriverError as error:
        raise CudaError(error.status) from error


class Stream:
    """A queue of work on the card, independent of all others.

    Attributes:
        is_capturing: Whether enqueued work is captured into a graph, instead of done.
    """

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.pointer: int = self._stream.ptr
        self.is_capturing = False
        self._fork = Event()

    def wait(self) -> None:
        """Block until all enqueued work is done.

        Raises:
            CudaError: Some of it failed.
        """
        _wait_for_card(cuda_runtime.streamSynchronize, self.pointer)

    def fork(self, other: Stream) -> None:
        """Make another stream's next work wait for all work so far of this stream. The host does not wait."""
        # One event serves all forks: `streamWaitEvent` waits for the last record before it, not for later ones.
        self._fork.record(self.pointer)
        cuda_runtime.streamWaitEvent(other.pointer, self._fork.pointer)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Return a graph of what `work` enqueues on this stream and on streams forked from it. Nothing is done yet.

        Raises:
            CudaError: It enqueues something that cannot be captured.
        """
        # In CUDA's stricter modes, the allocations and waits of other threads would make this capture fail.
        cuda_runtime.streamBeginCapture(self.pointer, cuda_runtime.streamCaptureModeRelaxed)
        self.is_capturing = True
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        finally:
            self.is_capturing = False
        return Graph(cuda_runtime.streamEndCapture(self.pointer))

    def _abandon_capture(self) -> None:
        try:
            graph = cuda_runtime.streamEndCapture(self.pointer)
        except CudaError:
            return  # The capture was invalid already. Either way it has ended for the stream.
        cuda_runtime.graphDestroy(graph)


def upload(target: int, source: Bytes, stream: int) -> None:
    """Enqueue a copy from host memory to the card. Memory that is not pinned has been read on return."""
    cuda_runtime.memcpyAsync(
        target, source.ctypes.data, source.nbytes, cuda_runtime.memcpyHostToDevice, stream
    )


def download(target: Bytes, source: int, stream: int) -> None:
    """Enqueue a copy from the card to pinned host memory."""
    cuda_runtime.memcpyAsync(
        target.ctypes.data, source, target.nbytes, cuda_runtime.memcpyDeviceToHost, stream
    )


def copy(target: int, source: int, size_bytes: int, stream: int) -> None:
    """Enqueue a copy within the card."""
    cuda_runtime.memcpyAsync(target, source, size_bytes, cuda_runtime.memcpyDeviceToDevice, stream)


def register_host(address: int, size_bytes: int) -> None:
    """Let all cards of the host read and write host memory by themselves. Raises CudaError."""
    _wait_for_card(cuda_runtime.hostRegister, address, size_bytes, _HOST_REGISTER_PORTABLE)


def unregister_host(address: int) -> None:
    """Undo `register_host`. No copy from or to the memory may be under way. Raises CudaError."""
    _wait_for_card(cuda_runtime.hostUnregister, address)


class PinnedBuffer:
    """Pinned host memory, which the card reads and writes by itself.

    Raises:
        ExhaustedError: The host cannot pin that much.
    """

    def __init__(self, size_bytes: int) -> None:
        try:
            self._memory = cupy.cuda.PinnedMemory(size_bytes)
        except CudaError as error:
            raise ExhaustedError(
                f"the host could not pin {size_bytes} bytes of memory: {error}"
            ) from None
        pointer = cupy.cuda.PinnedMemoryPointer(self._memory, 0)
        self.bytes: Bytes = np.frombuffer(pointer, np.uint8, size_bytes)


def ipc_handle(address: int) -> bytes:
    """Return the handle by which another process opens an allocation. Raises CudaError where CUDA IPC is missing."""
    return bytes(cuda_runtime.ipcGetMemHandle(address))


def synchronize() -> None:
    """Wait until the current card has done all work of this process.

    Raises:
        CudaError: Some of it failed; if the card must be reset, this fails each time.
    """
    _wait_for_card(cuda_runtime.deviceSynchronize)
