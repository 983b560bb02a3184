"""The arena: blocks that never overlap, and room that comes back, against a model that knows each byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from deconvd_client.shared_memory.arena import Arena
from tests.interrupts import interrupt_everywhere

_PAGE = 4096
_SIZE = 64 * _PAGE


class _Bytes(RuleBasedStateMachine):
    """Each line of 64 bytes is free or not; the arena must agree."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(_SIZE)
        self.is_taken = np.zeros(_SIZE // 64, bool)

    @rule(
        target=blocks,
        size=st.one_of(st.integers(1, 300), st.integers(1, _SIZE + 1), st.just(16 * _PAGE)),
    )
    def take(self, size: int) -> object:
        offset = self.arena.allocate(size)
        if offset is None:
            assert not self.fits(size)
            return multiple()
        first, count = offset // 64, -(-size // 64)
        if size >= 16 * _PAGE:
            assert offset % _PAGE == 0
            count = -(-size // _PAGE) * (_PAGE // 64)
        assert offset % 64 == 0
        assert first + count <= len(self.is_taken)
        assert not self.is_taken[first : first + count].any()
        self.is_taken[first : first + count] = True
        return offset, first, count

    @rule(block=consumes(blocks))
    def give(self, block: tuple[int, int, int]) -> None:
        offset, first, count = block
        self.arena.free(offset)
        self.is_taken[first : first + count] = False

    @rule(offset=st.integers(0, _SIZE))
    def give_what_is_none(self, offset: int) -> None:
        if offset % 64:
            with pytest.raises(KeyError):
                self.arena.free(offset)

    @invariant()
    def bytes_agree(self) -> None:
        assert self.arena.allocated_bytes == self.is_taken.sum() * 64
        assert self.arena.is_empty == (not self.is_taken.any())

    def fits(self, size: int) -> bool:
        grain = _PAGE // 64 if size >= 16 * _PAGE else 1
        count = -(-size // (64 * grain)) * grain
        starts = range(0, len(self.is_taken) - count + 1, grain)
        return any(not self.is_taken[start : start + count].any() for start in starts)


TestArenaAgainstBytes = _Bytes.TestCase
TestArenaAgainstBytes.settings = settings(
    max_examples=100, stateful_step_count=60, derandomize=True
)


def test_all_of_an_arena_can_be_taken_again_after_any_use() -> None:
    arena = Arena(_SIZE)
    offsets = [arena.allocate(1000) for _ in range(100)]

    for offset in offsets[::2] + offsets[1::2]:
        assert offset is not None
        arena.free(offset)

    assert arena.allocate(_SIZE) == 0


@pytest.mark.parametrize(
    ("size_bytes", "offset", "taken_bytes"),
    [
        (1, 64, 64),
        (64, 64, 64),
        (65, 64, 128),
        (15 * _PAGE + 1, 64, 15 * _PAGE + 64),
        (16 * _PAGE - 64, 64, 16 * _PAGE - 64),
        (16 * _PAGE, _PAGE, 16 * _PAGE),
        (16 * _PAGE + 1, _PAGE, 17 * _PAGE),
    ],
)
def test_blocks_are_lines_and_from_sixteen_pages_on_pages(
    size_bytes: int, offset: int, taken_bytes: int
) -> None:
    arena = Arena(_SIZE)
    assert arena.allocate(1) == 0
    assert arena.allocate(size_bytes) == offset
    assert arena.allocated_bytes == 64 + taken_bytes
    assert arena.offsets == [0, offset]


def test_the_tightest_gap_is_taken() -> None:
    arena = Arena(_SIZE)
    wide, _, tight, _ = (arena.allocate(size) for size in (640, 64, 128, 64))
    assert wide is not None
    assert tight is not None
    arena.free(wide)
    arena.free(tight)

    assert arena.allocate(128) == tight


@pytest.mark.parametrize("interrupted", ["allocate", "free"])
def test_no_room_is_lost_or_given_twice_to_what_an_interrupt_breaks_off(interrupted: str) -> None:
    arena = Arena(_SIZE)

    def begin() -> None:
        for offset in arena.offsets:
            arena.free(offset)
        for _ in range(6):
            arena.allocate(1000)
        for offset in arena.offsets[:4:2]:
            arena.free(offset)

    def work() -> None:
        if interrupted == "allocate":
            arena.allocate(500)
        else:
            arena.free(arena.offsets[1])

    begin()
    for _ in interrupt_everywhere(work):
        room_bytes = _SIZE - arena.allocated_bytes
        while arena.allocate(64) is not None:
            room_bytes -= 64
        assert room_bytes == 0
        assert arena.allocated_bytes == _SIZE
        begin()

    for offset in arena.offsets:
        arena.free(offset)
    assert arena.allocate(_SIZE) == 0


def test_what_was_given_cannot_be_given_again() -> None:
    arena = Arena(_SIZE)
    offset = arena.allocate(64)
    assert offset is not None
    arena.free(offset)

    with pytest.raises(KeyError):
        arena.free(offset)
