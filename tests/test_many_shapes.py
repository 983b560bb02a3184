"""A client and a server keep no more of thousands of shapes than of some hundred."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
import pytest

from deconvd.wire import codec
from deconvd_client import Connection, connect
from tests.grown_containers import find_containers, find_grown, receive_containers, serve_containers
from tests.servers import server_process

pytestmark = (
    pytest.mark.slow
)  # traced, it takes five times as long to look at all objects of a process

FEW = 64
SMALL_CACHES = {
    "deconvd.wire.codec:_MAX_CACHED_COUNT": FEW,
    "deconvd_server.engine.workload:_KINDS_COUNT": FEW,
}
"""Caches that are no `functools.lru_cache`, with fewer entries, so that few calls fill them."""

CALLS_COUNT = 640
GROWN_COUNT = 36
"""Less than the calls of one kind: by one transport, of one type and size, for y or gradients."""

TINY, SHARED = range(4, 84), range(128, 208)
"""Images on a side: whose elements travel in messages, and in shared memory where there is some."""

FLOATS = np.ones(1 << 16, np.float32)
HALVES = FLOATS.astype(np.float16)


def call_once_each(connections: list[Connection]) -> Iterator[None]:
    """Make a call of another shape at each step."""
    kinds = cycle(
        (F, elements, extents, is_gradient)
        for F in connections
        for elements in (FLOATS, HALVES)
        for extents in (TINY, SHARED)
        for is_gradient in (False, True)
    )
    shapes = product(range(80), repeat=2)
    for (i, j), (F, elements, extents, is_gradient) in zip(shapes, kinds, strict=False):
        h, w = extents[i], extents[j]
        x, W = elements[: h * w].reshape(1, 1, h, w), elements[:2].reshape(1, 1, 2, 1)
        gy = elements[: (h + 1) * w].reshape(1, 1, h + 1, w)
        if is_gradient:
            F.deconvolution_2d_grad(x, W, None, gy)
        else:
            F.deconvolution_2d(x, W)
        yield


def test_thousands_of_shapes_leave_no_container_that_grows(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_MAX_CACHED_COUNT", FEW)
    path = socket_directory / "containers"
    prelude = f"from {serve_containers.__module__} import serve_containers\nserve_containers({str(path)!r})"
    with (
        server_process(
            socket_directory,
            listen=("unix", "127.0.0.1:0"),
            constants=SMALL_CACHES,
            prelude=prelude,
        ) as server,
        connect(server.targets[0], transport="shared_memory") as shared,
        connect(server.targets[1], transport="tcp") as tcp,
    ):
        calls = call_once_each([shared, tcp])
        ours, the_servers = [], []
        for _ in range(3):
            assert sum(1 for _ in islice(calls, CALLS_COUNT)) == CALLS_COUNT
            ours.append(find_containers())
            the_servers.append(receive_containers(path))

        assert find_grown(*ours, count=GROWN_COUNT) == []
        assert find_grown(*the_servers, count=GROWN_COUNT) == []


class Leaking:
    """Keeps all that it is given."""

    def __init__(self) -> None:
        self.numbers: dict[int, float] = {}
        self.texts: list[str] = []

    @staticmethod
    @cache
    def square(number: int) -> int:
        return number**2

    @staticmethod
    @lru_cache(4096)
    def cube(number: int) -> int:
        return number**3


def test_each_kind_of_container_that_grows_is_found() -> None:
    leaking = Leaking()
    moments = []
    for number in range(300):
        leaking.numbers[number] = 0.5
        leaking.texts.append(str(number))
        leaking.square(number)
        leaking.cube(number)
        if number % 100 == 99:
            moments.append(find_containers())

    grown = find_grown(*moments, count=100)

    assert sorted(text.split()[0] for text in grown) == ["dict", "dict", "list"]
    assert all(text.endswith(": [100, 200, 300]") for text in grown)
