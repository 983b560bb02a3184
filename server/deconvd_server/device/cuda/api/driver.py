"""The part of the CUDA driver that is used here: graphs that record events, their copies' addresses, and their launch.

CuPy has none of it. Graphs, nodes, streams and events of the CUDA runtime are the driver's too.

None of these functions waits for the card, so they keep the interpreter's lock (`ctypes.PyDLL`). While other calls run,
getting the lock back would take many times as long as the functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache

__all__ = ["DriverError", "GraphCopy", "copies_of", "launch", "record_event"]

# of cuda.h
_EVENT_RECORD_EXTERNAL = 1
_NODE_TYPE_MEMCPY = 1
_MEMORY_TYPE_HOST, _MEMORY_TYPE_UNIFIED = 1, 4


class DriverError(Exception):
    """A function of the driver failed.

    Attributes:
        status: Its `CUresult`.
    """

    def __init__(self, function: str, status: int) -> None:
        super().__init__(f"{function} failed with status {status}")
        self.status = status


class _Memcpy(ctypes.Structure):
    """`CUDA_MEMCPY3D`, with addresses as numbers."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_z", ctypes.c_size_t),
        ("src_lod", ctypes.c_size_t),
        ("src_memory_type", ctypes.c_uint),
        ("src_host", ctypes.c_size_t),
        ("src_device", ctypes.c_size_t),
        ("src_array", ctypes.c_size_t),
        ("reserved0", ctypes.c_size_t),
        ("src_pitch", ctypes.c_size_t),
        ("src_height", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_z", ctypes.c_size_t),
        ("dst_lod", ctypes.c_size_t),
        ("dst_memory_type", ctypes.c_uint),
        ("dst_host", ctypes.c_size_t),
        ("dst_device", ctypes.c_size_t),
        ("dst_array", ctypes.c_size_t),
        ("reserved1", ctypes.c_size_t),
        ("dst_pitch", ctypes.c_size_t),
        ("dst_height", ctypes.c_size_t),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class GraphCopy:
    """A copy that a graph makes.

    Attributes:
        addresses: Its addresses that may be the host's, by the names that `retarget` takes. At most two.
    """

    def __init__(self, node: ctypes.c_void_p) -> None:
        self._node = node
        self._copy = _Memcpy()
        _call("cuGraphMemcpyNodeGetParams", node, ctypes.byref(self._copy))
        self.addresses = dict(self._host_addresses())

    def _host_addresses(self) -> Iterator[tuple[str, int]]:
        for side in ("src", "dst"):
            memory_type = getattr(self._copy, f"{side}_memory_type")
            if memory_type == _MEMORY_TYPE_HOST:
                yield f"{side}_host", getattr(self._copy, f"{side}_host")
            elif (
                memory_type == _MEMORY_TYPE_UNIFIED
            ):  # the driver has not looked whose the address is
                yield f"{side}_device", getattr(self._copy, f"{side}_device")

    def retarget(self, executable: int, name: str, address: int) -> None:
        """Let later launches copy from or to another address of the host, which must be registered as well.

        Args:
            executable: The graph's `cudaGraphExec_t`.
            name: The name of the address in `addresses`.

        Raises:
            DriverError: The driver refuses.
        """
        setattr(self._copy, name, address)
        context = ctypes.c_void_p()
        _call("cuCtxGetCurrent", ctypes.byref(context))
        _call(
            "cuGraphExecMemcpyNodeSetParams",
            ctypes.c_void_p(executable),
            self._node,
            ctypes.byref(self._copy),
            context,
        )


def copies_of(graph: int) -> list[GraphCopy]:
    """Return the copies in a `cudaGraph_t`. They must not be used once it is destroyed. Raises DriverError."""
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))  # the number alone
    nodes = (ctypes.c_void_p * count.value)()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    return [
        GraphCopy(ctypes.c_void_p(node)) for node in nodes if _type_of(node) == _NODE_TYPE_MEMCPY
    ]


def record_event(event: int, stream: int) -> None:
    """Let each launch of the graph that is captured from a stream record an event. Raises DriverError."""
    _call(
        "cuEventRecordWithFlags",
        ctypes.c_void_p(event),
        ctypes.c_void_p(stream),
        _EVENT_RECORD_EXTERNAL,
    )


def launch(executable: int, stream: int) -> None:
    """Enqueue a `cudaGraphExec_t` on a stream. Raises DriverError."""
    _call("cuGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))


def _type_of(node: int | None) -> int:
    node_type = ctypes.c_int()
    _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(node_type))
    return node_type.value


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise DriverError(name, status)


@lru_cache(1)
def _library() -> ctypes.PyDLL:
    return ctypes.PyDLL("libcuda.so.1")
