"""A graph that is launched again with other arrays of the host."""

from __future__ import annotations

from deconvd_server.device.cuda.api.host_memory import HostAddresses
from deconvd_server.device.cuda.api.runtime import Graph

__all__ = ["BoundGraph"]


class BoundGraph:
    """A graph, with its copies from and to arrays of the host: `rebind` points them at other arrays.

    That takes a fraction of the time of a new capture.

    Args:
        addresses: Of the arrays that the graph was captured with, which do not overlap. Copies from and to other
            host memory, such as mirrors, stay as they are.

    Raises:
        CudaError: The driver does not show the graph's copies.
    """

    def __init__(self, graph: Graph, addresses: HostAddresses) -> None:
        self._graph = graph
        self._addresses: HostAddresses | None = addresses
        self._bindings = [
            (copy, name, *found)
            for copy in (graph.copies() if addresses.begins else ())
            for name, address in copy.addresses.items()
            if (found := addresses.find(address)) is not None
        ]

    def rebind(self, addresses: HostAddresses) -> None:
        """Let later launches use arrays of the same sizes at other addresses.

        Raises:
            CudaError: The driver refuses. The graph must not be launched until a later `rebind` succeeds.
        """
        if addresses == self._addresses:
            return
        self._addresses = None  # until all copies are retargeted, some point at the arrays before
        for copy, name, number, offset in self._bindings:
            self._graph.retarget_copy(copy, name, addresses.begins[number] + offset)
        self._addresses = addresses

    def launch(self, stream: int) -> None:
        """Enqueue the graph on a stream."""
        self._graph.launch(stream)
