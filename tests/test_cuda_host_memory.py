"""Which arrays lie in registered memory, with a CUDA that only takes notes."""

from __future__ import annotations

import logging
import mmap

import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd_server.device.cuda.api.host_memory import HostAddresses, RegisteredMemory

PAGES = 8
SIZE_BYTES = PAGES * mmap.PAGESIZE


class Notes:
    """What is registered now, by address; memory at an address in `refused` is not taken."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refused: set[int] = set()
        self.host = RegisteredMemory(self.register, self.registered.__delitem__)

    def register(self, address: int, size_bytes: int) -> None:
        if address in self.refused:
            raise RuntimeError("out of luck")
        assert address not in self.registered
        self.registered[address] = size_bytes


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def memory() -> Array:
    return np.frombuffer(mmap.mmap(-1, SIZE_BYTES), np.uint8)


def address(array: Array) -> int:
    return array.ctypes.data


def test_addresses_mean_the_same_until_something_is_registered_or_left(
    notes: Notes, memory: Array
) -> None:
    generations = [notes.host.generation]
    for _ in range(2):
        undo = notes.host.register(address(memory), SIZE_BYTES)
        generations.append(notes.host.generation)
        undo()
        generations.append(notes.host.generation)
    assert len(set(generations)) == len(generations)


def test_arrays_in_registered_memory_are_known_until_it_is_left(
    notes: Notes, memory: Array
) -> None:
    floats = memory.view(np.float32)
    assert not notes.host.holds(floats)

    undo = notes.host.register(address(memory), SIZE_BYTES)

    assert notes.registered == {address(memory): SIZE_BYTES}
    assert notes.host.holds(floats)
    assert notes.host.holds(floats[:1])
    assert notes.host.holds(floats[-1:])
    assert notes.host.holds(floats[3:7].reshape(2, 2))

    undo()
    assert not notes.host.holds(floats)
    assert notes.registered == {}


def test_what_is_not_as_the_card_has_it_is_not_held(notes: Notes, memory: Array) -> None:
    notes.host.register(address(memory), SIZE_BYTES)
    floats = memory.view(np.float32).reshape(4, -1)
    assert not notes.host.holds(floats[:, 1:])
    assert not notes.host.holds(floats.T)
    assert not notes.host.holds(floats.view(floats.dtype.newbyteorder()))


def test_arrays_beside_registered_memory_are_not_held(notes: Notes, memory: Array) -> None:
    page = mmap.PAGESIZE
    for first in (1, 5):
        notes.host.register(address(memory) + first * page, 2 * page)
    held = [notes.host.holds(memory[n * page : (n + 1) * page]) for n in range(PAGES)]
    assert held == [False, True, True, False, False, True, True, False]
    assert not notes.host.holds(memory[page : 3 * page + 1])
    assert not notes.host.holds(memory[page - 1 : page + 1])
    assert not notes.host.holds(memory)


def test_memory_that_several_cards_ask_for_is_registered_once(notes: Notes, memory: Array) -> None:
    first = notes.host.register(address(memory), SIZE_BYTES)
    second = notes.host.register(address(memory), SIZE_BYTES)

    first()
    assert notes.host.holds(memory)
    second()

    assert not notes.host.holds(memory)
    assert notes.registered == {}


def test_memory_that_is_refused_is_like_any_other_and_told_of_once(
    notes: Notes, memory: Array, caplog: pytest.LogCaptureFixture
) -> None:
    notes.refused.add(address(memory))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            undo = notes.host.register(address(memory), SIZE_BYTES)
            assert not notes.host.holds(memory)
            undo()
    (record,) = caplog.records
    assert "out of luck" in record.getMessage()


def test_places_are_found_by_what_lies_in_them(memory: Array) -> None:
    arrays = memory[100:200], memory[4096:4100], memory[:100]
    places = HostAddresses.of(3, arrays)
    begin = address(memory)

    assert places.find(begin + 100) == (0, 0)
    assert places.find(begin + 199) == (0, 99)
    assert places.find(begin + 4099) == (1, 3)
    assert places.find(begin) == (2, 0)
    assert places.find(begin + 200) is None
    assert places.find(begin - 1) is None
    assert places == HostAddresses.of(3, arrays)
    assert places != HostAddresses.of(4, arrays)
    assert places != HostAddresses.of(3, arrays[::-1])


def test_places_of_two_arrays_are_known_if_cards_reach_both(notes: Notes, memory: Array) -> None:
    x, y = memory[4096:8192], memory[:100]
    assert notes.host.addresses(x, y) is None
    undo = notes.host.register(address(memory), SIZE_BYTES)

    places = notes.host.addresses(x, y)

    assert places == HostAddresses.of(notes.host.generation, [x, y])
    assert places.with_arrays([memory[200:300]]) == HostAddresses.of(
        notes.host.generation, [memory[200:300], x, y]
    )
    assert notes.host.addresses(x, np.empty(8)) is None
    assert notes.host.addresses(np.empty(8), y) is None
    undo()
    assert notes.host.addresses(x, y) is None


@pytest.mark.parametrize(
    ("bounds", "are_apart"),
    [
        ([], True),
        ([(0, 8)], True),
        ([(8, 16), (0, 8)], True),
        ([(0, 9), (8, 16)], False),
        ([(8, 16), (0, 32), (40, 48)], False),
        ([(0, 32), (8, 16), (32, 48)], False),
        ([(0, 8), (0, 8)], False),
    ],
)
def test_places_are_apart_if_no_two_overlap(
    memory: Array, bounds: list[tuple[int, int]], are_apart: bool
) -> None:
    places = HostAddresses.of(0, [memory[begin:end] for begin, end in bounds])

    assert places.are_disjoint == are_apart
