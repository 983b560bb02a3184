"""The pieces of a striped call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.direct import pieces
from deconvd.direct.pieces import PIECE_BYTES, PieceSpace, run_length


@given(st.lists(st.integers(0, 40), max_size=5))
def test_pieces_cover_all_elements_in_their_order_and_none_twice(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 8)
        arrays = [np.full(size, number, np.uint8) for number, size in enumerate(sizes)]
        space = PieceSpace(arrays)

        covered = [b"".join(space.buffers(number)) for number in range(space.pieces_count)]

        assert b"".join(covered) == b"".join(array.tobytes() for array in arrays)
        assert all(len(piece) == 8 for piece in covered[:-1])
        assert space.size_bytes == sum(sizes)


def test_pieces_are_the_arrays_own_memory() -> None:
    W, x = np.zeros((2, 3), np.float16), np.zeros(PIECE_BYTES, np.float32)
    space = PieceSpace([W, x])

    space.buffers(0)[0][:2] = np.float16(2).tobytes()
    space.buffers(space.pieces_count - 1)[-1][-4:] = np.float32(3).tobytes()

    assert W[0, 0] == 2
    assert x[-1] == 3


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 30), st.integers(0, 12))
def test_a_run_is_whole_pieces_and_its_size_says_how_many(
    sizes: list[int], number: int, count: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 8)
        space = PieceSpace([np.arange(size, dtype=np.uint8) for size in sizes])
        run = b"".join(space.buffers(number, count)) if number < space.pieces_count else b""

        one_by_one = range(number, min(number + count, space.pieces_count))
        assert run == b"".join(b"".join(space.buffers(each)) for each in one_by_one)
        assert space.count_in_run(number, len(run)) == len(one_by_one)
        assert space.count_before(number * 8 + len(run)) == number + len(one_by_one) or not run


@pytest.mark.parametrize(
    ("number", "size_bytes"),
    [(0, 0), (0, 7), (0, 9), (2, 8), (2, 4), (3, 8), (3, 0), (2**64 - 1, 8)],
)
def test_what_does_not_end_with_a_piece_is_no_run(
    number: int, size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8)
    space = PieceSpace([np.zeros(19, np.uint8)])
    assert space.count_in_run(number, size_bytes) == 0


def test_runs_are_long_where_many_call() -> None:
    assert [run_length(count, 100) for count in (1, 2, 3, 4, 8)] == [4, 4, 1, 1, 1]
    assert [run_length(2, count) for count in range(9)] == [1, 1, 1, 2, 2, 3, 3, 4, 4]
