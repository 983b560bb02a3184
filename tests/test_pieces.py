"""The pieces of a striped call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.direct import pieces
from deconvd.direct.pieces import PIECE_BYTES, PieceSpace


@given(st.lists(st.integers(0, 40), max_size=5))
def test_pieces_cover_all_elements_in_their_order_and_none_twice(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 8)
        arrays = [np.full(size, number, np.uint8) for number, size in enumerate(sizes)]
        space = PieceSpace(arrays)

        covered = [b"".join(space.buffers(number)) for number in range(space.pieces_count)]

        assert b"".join(covered) == b"".join(array.tobytes() for array in arrays)
        assert [len(piece) for piece in covered] == [
            space.piece_bytes(number) for number in range(space.pieces_count)
        ]
        assert all(len(piece) == 8 for piece in covered[:-1])
        assert space.size_bytes == sum(sizes)


def test_pieces_are_the_arrays_own_memory() -> None:
    W, x = np.zeros((2, 3), np.float16), np.zeros(PIECE_BYTES, np.float32)
    space = PieceSpace([W, x])

    space.buffers(0)[0][:2] = np.float16(2).tobytes()
    space.buffers(space.pieces_count - 1)[-1][-4:] = np.float32(3).tobytes()

    assert W[0, 0] == 2
    assert x[-1] == 3
