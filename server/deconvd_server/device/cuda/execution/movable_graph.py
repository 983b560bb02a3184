"""A graph whose arrays on the host may be others from launch to launch."""

from __future__ import annotations

from deconvd_server.device.cuda.api.host_memory import HostAddresses
from deconvd_server.device.cuda.api.runtime import Graph

__all__ = ["BoundGraph"]


class BoundGraph:
    """Captured work, and which of its copies go to and from which arrays on the host.

    To point them at others takes a fraction of what it takes to capture the work anew.

    Args:
        places: Of the arrays that it was captured with, apart from each other; of others it copies
            to and from the same places ever after.

    Raises:
        CudaError: What it copies cannot be seen.
    """

    def __init__(self, graph: Graph, places: HostAddresses) -> None:
        self._graph = graph
        self._addresses: HostAddresses | None = places
        self._bindings = [
            (copy, name, *found)
            for copy in (graph.copies() if places.begins else ())
            for name, address in copy.addresses.items()
            if (found := places.find(address)) is not None
        ]

    def rebind(self, places: HostAddresses) -> None:
        """Have later launches use arrays of the same sizes elsewhere.

        Raises:
            CudaError: The driver refuses; until this succeeds, the graph is not to be launched.
        """
        if places == self._addresses:
            return
        self._addresses = None
        for copy, name, number, offset in self._bindings:
            self._graph.retarget_copy(copy, name, places.begins[number] + offset)
        self._addresses = places

    def launch(self, stream: int) -> None:
        """Enqueue the work on a stream."""
        self._graph.launch(stream)
