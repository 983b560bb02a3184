"""The ways by which calls reach a server, each with a floor: what nothing that moves the same bytes is faster than."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from deconvd.errors import (
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.host.parallel_copy import copy_all
from deconvd_client.arguments import CallBuilder
from deconvd_client.cli.bare_sockets import bare_calls, bare_server
from deconvd_client.cli.bench_problems import LAYERS_BY_NAME, BenchOperands
from deconvd_client.cli.call_times import CallTimes, time_call
from deconvd_client.cli.options import open_server
from deconvd_client.config import Config
from deconvd_client.server import Server
from deconvd_client.transports.route import TransportName

__all__ = ["BareCalls", "BareMoves", "BenchWay", "open_ways"]

_NAMES: Final = (
    TransportName.GRPC,  # first: it reaches every server, so if it does not, nothing does
    TransportName.SHARED_MEMORY,
    TransportName.UNIX,
    TransportName.TCP,
)

_OBSTACLE_ERRORS: Final = (
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
"""The errors of calls, and of the arguments, that mean that a server is not reached by one way."""

_BARE_CONNECTIONS_COUNT: Final = 4
"""How many connections the bare program has for large calls: ours has up to as many."""

_LARGE_BYTES: Final = 1 << 20

BareCalls: TypeAlias = Mapping[str, Callable[[], None]]
"""Programs that move the bytes of a call, by their names."""


@dataclass(frozen=True, slots=True)
class BenchWay:
    """A way by which calls reach a server.

    Attributes:
        name: How tensors travel.
        server: The server, with connections that are used for this way alone.
    """

    name: TransportName
    server: Server

    def call(self, operands: BenchOperands) -> CallTimes:
        """Make a call, and return where its time went. Raises DeconvdErrors."""
        builder = CallBuilder(self.server.residents, Config())

        def call() -> None:
            x, W, b, geometry = operands.x, operands.W, operands.b, operands.geometry
            self.server.execute(builder.deconvolution(x, W, b, geometry))

        return time_call(self.server.ledgers, call)


@contextmanager
def open_ways(
    target: str, timeout_s: float
) -> Iterator[tuple[list[BenchWay], dict[TransportName, str]]]:
    """Yield the ways that reach a server, and for each other way why it does not. They are closed after the block.

    Raises:
        DeconvdError: No way reaches it.
    """
    ways: list[BenchWay] = []
    obstacles: dict[TransportName, str] = {}
    probe = BenchOperands.of(LAYERS_BY_NAME["small"].problem(np.dtype(np.float32)))
    with ExitStack() as stack:
        for name in _NAMES:
            try:
                way = BenchWay(name, open_server(target, name, timeout_s))
                stack.enter_context(closing(way.server))
                way.call(probe)  # larger than what goes in a message, also where the rest does not
                carrier = way.server.current_transport
                obstacle = "" if carrier is name else f"calls go by {carrier} instead"
            except _OBSTACLE_ERRORS as error:
                if name is TransportName.GRPC:
                    raise
                obstacle = str(error)
            if obstacle:
                obstacles[name] = obstacle
            else:
                ways.append(way)
        yield sorted(ways, key=lambda way: list(TransportName).index(way.name)), obstacles


class BareMoves:
    """Runs what ways are compared with: copies in memory, and bare sockets on this host, in another process."""

    def __init__(self) -> None:
        self._addresses: dict[bool, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BareMoves:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def calls(
        self, way: TransportName, operands: BenchOperands, y_bytes: int
    ) -> Iterator[BareCalls]:
        """Yield programs that move the bytes of a call as a way does. The faster of them is the floor.

        Args:
            y_bytes: The size of the result. In shared memory it is not moved.
        """
        arrays = [operands.x, operands.W, operands.b]
        if way is TransportName.SHARED_MEMORY:
            pairs = [(np.ones_like(array), array) for array in arrays]
            yield {"copy": lambda: copy_all(pairs)}
            return
        sent = np.ones(operands.nbytes, np.uint8)
        received = np.ones(y_bytes, np.uint8)
        counts = [1, _BARE_CONNECTIONS_COUNT] if operands.nbytes + y_bytes >= _LARGE_BYTES else [1]
        address = self._address(is_unix=way is TransportName.UNIX)
        with ExitStack() as stack:
            yield {
                f"socket{count}": stack.enter_context(bare_calls(address, count, sent, received))
                for count in counts
            }

    def _address(self, *, is_unix: bool) -> str:
        if is_unix not in self._addresses:
            server = bare_server(is_unix=is_unix)
            self._addresses[is_unix] = self._stack.enter_context(server)
        return self._addresses[is_unix]
