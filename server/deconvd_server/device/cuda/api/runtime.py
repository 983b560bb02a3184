"""What is used of the CUDA runtime, typed: all that is known of CuPy outside the kernels."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from deconvd.errors import ExhaustedError
from deconvd.lending.protocol import card_id
from deconvd_server.device.cuda.api.driver import (
    DriverError,
    GraphCopy,
    copies_of,
    launch,
    record_event,
)
from deconvd_server.device.faults import DeviceUnavailableError

__all__ = [
    "Bytes",
    "CardMemoryPool",
    "CardProperties",
    "CudaError",
    "Event",
    "Graph",
    "PinnedBuffer",
    "Stream",
    "cards_count",
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

_INSTALL = "pip install '.[server,cuda13]' in a checkout of deconvd"
_OLDEST_CAPABILITY = 80
"""Our kernels copy to shared memory asynchronously, and multiply bfloat16 matrices."""

_HOST_REGISTER_PORTABLE = 1  # of cuda_runtime_api.h; CuPy has no name for it

try:
    import cupy
    from cupy.cuda import runtime as _cuda
    from cupy_backends.cuda.api.runtime import CUDARuntimeError as CudaError
except ImportError as error:
    raise DeviceUnavailableError(f"CuPy cannot be loaded ({error}): {_INSTALL}") from None

Bytes = npt.NDArray[np.uint8]


class CardProperties:
    """What a card is. Making it starts CUDA on it.

    Raises:
        DeviceUnavailableError: There is no such card, no driver, or the card is too old.
    """

    def __init__(self, ordinal: int) -> None:
        count = cards_count()
        if ordinal >= count:
            raise DeviceUnavailableError(
                f"there is no card cuda:{ordinal}: this host shows {count}, see nvidia-smi"
            )
        self.ordinal = ordinal
        properties = _cuda.getDeviceProperties(ordinal)
        self.name: str = properties["name"].decode()
        self.capability: int = properties["major"] * 10 + properties["minor"]
        self.id: bytes = card_id(bytes(properties["uuid"]))
        self.processors_count: int = properties["multiProcessorCount"]
        if self.capability < _OLDEST_CAPABILITY:
            raise DeviceUnavailableError(
                f"cuda:{ordinal}, {self.name}, is too old: an Ampere card or a newer one is needed"
            )
        with current_device(ordinal):
            self.free_bytes, self.memory_bytes = (int(size) for size in _cuda.memGetInfo())


def open_card(ordinal: int) -> CardProperties:
    """Return what a card is, once CUDA has started on it. Raises as `Card`."""
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
        return int(_cuda.getDeviceCount())
    except CudaError as error:
        raise DeviceUnavailableError(
            f"no NVIDIA card can be used ({error}): install NVIDIA's driver, version 580 or newer"
        ) from None


def current_device(ordinal: int) -> AbstractContextManager[object]:
    """Let the calling thread use a card for the length of a with-block."""
    return _CardContext(ordinal)


class _CardContext(AbstractContextManager[None]):
    """See `current_device`. It is CuPy's `Device`, without what there is to a thread that has the card already."""

    __slots__ = ("_before", "_ordinal")

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal

    def __enter__(self) -> None:
        self._before: int = _cuda.getDevice()
        if self._before != self._ordinal:
            _cuda.setDevice(self._ordinal)

    def __exit__(self, *_: object) -> None:
        if self._before != self._ordinal:
            _cuda.setDevice(self._before)


def use_device(ordinal: int) -> None:
    """Let the calling thread use a card from now on."""
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
        """Put the event behind what has been enqueued on a stream.

        Args:
            in_graph: Whether each launch of the graph that is being captured is to do so.
        """
        if in_graph:
            _call_driver(record_event, self._event.ptr, stream)
        else:
            _cuda.eventRecord(self._event.ptr, stream)

    def wait(self) -> None:
        """Block until the card has got to the event; at once if it was never recorded."""
        _cuda.eventSynchronize(self._event.ptr)

    def ms_since(self, start: Event) -> float:
        """Return the milliseconds between two events that were waited for."""
        return float(_cuda.eventElapsedTime(start._event.ptr, self._event.ptr))


class Graph:
    """Captured work, launched as one.

    Args:
        graph: The `cudaGraph_t`; it ends with this.
    """

    def __init__(self, graph: int) -> None:
        self._graph = graph
        end = weakref.finalize(self, _cuda.graphDestroy, graph)
        self._executable: int = _cuda.graphInstantiate(graph)
        end_executable = weakref.finalize(self, _cuda.graphExecDestroy, self._executable)
        end.atexit = end_executable.atexit = False

    def launch(self, stream: int) -> None:
        """Enqueue the work on a stream. Raises CudaError."""
        _call_driver(launch, self._executable, stream)

    def copies(self) -> list[GraphCopy]:
        """Return the copies in it. Raises CudaError."""
        return _call_driver(copies_of, self._graph)

    def retarget_copy(self, copy: GraphCopy, name: str, address: int) -> None:
        """Have later launches make one of its copies elsewhere: see `GraphCopy.move`. Raises CudaError."""
        _call_driver(copy.retarget, self._executable, name, address)


def _call_driver(function: Callable[..., _T], *arguments: object) -> _T:
    """Return what one of the driver's functions returns. What it raises is CudaError here: the numbers are the same.

    A function, since an error that another one replaces in a context made of a generator refers to itself: what its
    frames hold, a call's arrays, would stay until the garbage collector comes by.
    """
    try:
        return function(*arguments)
    except DriverError as error:
        raise CudaError(error.status) from error


class Stream:
    """A queue of work on the card, independent of all others.

    Attributes:
        is_capturing: Whether what is enqueued becomes a graph.
    """

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.pointer: int = self._stream.ptr
        self.is_capturing = False
        self._fork = Event()

    def wait(self) -> None:
        """Block until all that was enqueued is done.

        Raises:
            CudaError: Some of it failed.
        """
        _cuda.streamSynchronize(self.pointer)

    def fork(self, other: Stream) -> None:
        """Let another stream's next work begin when this stream's work so far is done."""
        # one event is enough: the other stream waits for what it stood for when it was told to
        self._fork.record(self.pointer)
        _cuda.streamWaitEvent(other.pointer, self._fork.pointer)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Return what `work` enqueues on this stream as a graph, without doing it.

        Raises:
            CudaError: It does something that cannot be captured.
        """
        # relaxed: other threads allocate and wait meanwhile, which is no concern of this stream
        _cuda.streamBeginCapture(self.pointer, _cuda.streamCaptureModeRelaxed)
        self.is_capturing = True
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        finally:
            self.is_capturing = False
        return Graph(_cuda.streamEndCapture(self.pointer))

    def _abandon_capture(self) -> None:
        try:
            graph = _cuda.streamEndCapture(self.pointer)
        except CudaError:
            return  # the capture was invalid already; either way the stream is out of it now
        _cuda.graphDestroy(graph)


def upload(target: int, source: Bytes, stream: int) -> None:
    """Enqueue a copy of host memory to the card. If it is not pinned, wait until it has been read."""
    _cuda.memcpyAsync(target, source.ctypes.data, source.nbytes, _cuda.memcpyHostToDevice, stream)


def download(target: Bytes, source: int, stream: int) -> None:
    """Enqueue a copy from the card to pinned host memory."""
    _cuda.memcpyAsync(target.ctypes.data, source, target.nbytes, _cuda.memcpyDeviceToHost, stream)


def copy(target: int, source: int, size_bytes: int, stream: int) -> None:
    """Enqueue a copy within the card."""
    _cuda.memcpyAsync(target, source, size_bytes, _cuda.memcpyDeviceToDevice, stream)


def register_host(address: int, size_bytes: int) -> None:
    """Let all cards read and write host memory by themselves, wherever they are. Raises CudaError."""
    _cuda.hostRegister(address, size_bytes, _HOST_REGISTER_PORTABLE)


def unregister_host(address: int) -> None:
    """Undo `register_host`. No copy may be under way. Raises CudaError."""
    _cuda.hostUnregister(address)


class PinnedBuffer:
    """Host memory that the card reads and writes by itself.

    Raises:
        ExhaustedError: The host has not the memory.
    """

    def __init__(self, size_bytes: int) -> None:
        try:
            self._memory = cupy.cuda.PinnedMemory(size_bytes)
        except CudaError as error:
            raise ExhaustedError(f"no {size_bytes} bytes of pinned host memory: {error}") from None
        pointer = cupy.cuda.PinnedMemoryPointer(self._memory, 0)
        self.bytes: Bytes = np.frombuffer(pointer, np.uint8, size_bytes)


def ipc_handle(address: int) -> bytes:
    """Return what other processes open an allocation by. Raises CudaError if the system has no such thing."""
    return bytes(_cuda.ipcGetMemHandle(address))


class _Allocation:
    """Memory of the current card, in no pool; given back when it is collected."""

    def __init__(self, size_bytes: int, on_free: Callable[[], None]) -> None:
        self.ptr: int = _cuda.malloc(size_bytes)
        give_back = weakref.finalize(
            self, _free_allocation, cupy.cuda.Device().id, self.ptr, on_free
        )
        give_back.atexit = False


def _free_allocation(ordinal: int, address: int, on_free: Callable[[], None]) -> None:
    with current_device(ordinal):
        _cuda.free(address)
    on_free()


class CardMemoryPool:
    """The card's memory, up to a limit; what is freed is kept for the next who asks.

    A block may be used on any stream, so whoever gives one back has waited for its work. (CuPy
    keeps blocks apart by the thread's current stream, which is CUDA's null stream in all of ours.)
    Blocks that stay for long come from a pool of their own: small ones would split, and so hold,
    the large blocks that calls use again and again. Blocks that other processes see come from none:
    they would see what lies beside them.

    Args:
        limit_bytes: What blocks in use and blocks kept may take together.

    Attributes:
        made_count: Blocks for calls that no kept one could serve, for statistics: threads may lose
            one.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.RLock()  # also taken by finalizers
        self._pool = cupy.cuda.MemoryPool()
        self._resident_pool = cupy.cuda.MemoryPool()
        self._pool.set_limit(size=limit_bytes)
        self._lent_bytes = 0
        self.misses_count = 0

    def allocate(self, size_bytes: int) -> Any:
        """Return a block: its `ptr` is aligned to 512 bytes, and it is given back when collected.

        Raises:
            MemoryError: There is no such block.
        """
        held_bytes = self._pool.total_bytes()
        try:
            block = self._pool.malloc(size_bytes)
        except MemoryError:
            with self._lock:
                self._resident_pool.free_all_blocks()
                self._share_limit()
            block = self._pool.malloc(size_bytes)
        self.misses_count += self._pool.total_bytes() > held_bytes
        return block

    def allocate_resident(self, size_bytes: int) -> Any:
        """Return a block that will stay for long. Otherwise as `take`."""
        with self._lock:
            self._make_room(size_bytes)
            try:
                return self._resident_pool.malloc(size_bytes)
            finally:
                self._share_limit()

    def allocate_shared(self, size_bytes: int) -> Any:
        """Return a block, all zeros, that other processes may see. Otherwise as `take`."""
        with self._lock:
            self._make_room(size_bytes)
            try:
                block = _Allocation(size_bytes, partial(self._count_lent, -size_bytes))
            except CudaError as error:
                raise MemoryError(f"no {size_bytes} bytes to lend: {error}") from None
            self._count_lent(size_bytes)
        stream = Stream()  # to wait for the whole card would break what other threads capture
        _cuda.memsetAsync(block.ptr, 0, size_bytes, stream.pointer)
        stream.wait()
        return block

    def held_for_calls_bytes(self) -> int:
        """Return what blocks of calls take of the card, in use and kept for the next."""
        return int(self._pool.total_bytes())

    def held_bytes(self) -> int:
        """Return what blocks in use and blocks kept take of the card."""
        kept_bytes = self._pool.total_bytes() + self._resident_pool.total_bytes()
        return int(kept_bytes + self._lent_bytes)

    def trim(self) -> None:
        """Give blocks kept back to the card."""
        self._pool.free_all_blocks()
        self._resident_pool.free_all_blocks()

    def _make_room(self, size_bytes: int) -> None:
        """Give blocks kept back to the card, if so many bytes would be too much beside them."""
        if self.held_bytes() + size_bytes > self.limit_bytes:
            self.trim()

    def _count_lent(self, size_bytes: int) -> None:
        with self._lock:
            self._lent_bytes += size_bytes
            self._share_limit()

    def _share_limit(self) -> None:
        """Leave calls what is not held by blocks that stay, or are lent."""
        rest_bytes = self.limit_bytes - self._resident_pool.total_bytes() - self._lent_bytes
        self._pool.set_limit(size=max(rest_bytes, 1))  # 0 would be no limit


def synchronize() -> None:
    """Wait for the whole current card, and learn whether it still works.

    Raises:
        CudaError: Work failed.
    """
    _cuda.deviceSynchronize()
