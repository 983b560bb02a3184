"""What one reader of metrics may see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

from prometheus_client import Metric
from prometheus_client.registry import Collector

__all__ = ["ReaderCollector"]


class ReaderCollector(Collector):
    """The metrics that one reader may see.

    Args:
        collect: Yields the metrics of an identity's calls and of the server, or all if it is empty.
        identity: The name that the reader has proved. Empty if the server asks for none: then everyone sees all.
        readers: The identities that see all.
    """

    def __init__(
        self, collect: Callable[[str], Iterator[Metric]], identity: str, readers: Collection[str]
    ) -> None:
        self._collect = partial(collect, "" if identity in readers else identity)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        return self._collect()
