"""A graph whose arrays on the host may be others from launch to launch."""

from __future__ import annotations

from deconvd_server.device.cuda.api.host_memory import HostPlaces
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

    def __init__(self, graph: Graph, places: HostPlaces) -> None:
        self._graph = graph
        self._places: HostPlaces | None = places
        self._moves = [
            (copy, name, *found)
            for copy in (graph.copies() if places.begins else ())
            for name, address in copy.addresses.items()
            if (found := places.find(address)) is not None
        ]

    def move(self, places: HostPlaces) -> None:
        """Have later launches use arrays of the same sizes elsewhere.

        Raises:
            CudaError: The driver refuses; until this succeeds, the graph is not to be launched.
        """
        if places == self._places:
            return
        self._places = None
        for copy, name, number, offset in self._moves:
            self._graph.move(copy, name, places.begins[number] + offset)
        self._places = places

    def launch(self, stream: int) -> None:
        """Enqueue the work on a stream."""
        self._graph.launch(stream)
