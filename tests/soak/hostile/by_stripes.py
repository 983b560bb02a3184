"""What hostile clients do by striped calls."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

from tests.soak.hostile.attack import Attacker, hostile
from tests.stream_pairs import send_raw
from tests.striped_calls import StripedCall

_HELD_S = 6.0
"""How long an attack holds what it has before it goes."""

_FOR_EVER_S = 2**44
"""About the longest timeout that a call can have."""

_X = np.ones((18, 2, 256, 256), np.float32)
"""Three pieces."""


def _striped_call(a: Attacker, stripes_count: int = 2) -> StripedCall:
    stripes = [a.line() for _ in range(stripes_count)]
    return StripedCall(a.line(), stripes, _X, timeout_s=_FOR_EVER_S)


@hostile
def stalled_stripes(a: Attacker) -> None:
    """Striped calls that stop anywhere: without stripes, in a piece, before the end, before the results."""
    for number in range(24):
        with suppress(OSError):  # of those that are too many
            call = _striped_call(a)
            call.send_call()
            if number % 4:
                call.join()
                call.send_pieces([0])
            if number % 4 == 2:
                head = call.stripes[1].protocol.begin_piece(1, 4 << 20)
                send_raw(call.stripes[1], head + bytes(a.random.randrange(4 << 20)))
            if number % 4 == 3:
                call.send_pieces(range(1, call.operands.pieces_count))
                call.end_pieces()
    time.sleep(_HELD_S)


@hostile
def stripes_without_a_call(a: Attacker) -> None:
    """Stripes whose call never comes, each of a transfer of its own."""
    for _ in range(100):
        with suppress(OSError):
            call = _striped_call(a, 2)
            call.join()
            call.stripes[0].send_piece(0, [memoryview(b"\0")])
    time.sleep(_HELD_S)


@hostile
def wrong_pieces(a: Attacker) -> None:
    """Pieces that come twice, that are none of the call's, or are of a wrong size, and calls that lack some."""
    for _ in range(30):
        with suppress(OSError):
            call = _striped_call(a)
            call.send_call()
            call.join()
            call.send_pieces(a.random.choices(range(call.operands.pieces_count), k=4))
            number = a.random.choice([0, 1, 3, 1 << 20, (1 << 64) - 1])
            call.stripes[0].send_piece(number, [memoryview(bytes(a.random.randrange(1 << 16)))])
            call.end_pieces()
            call.receive_answer()


@hostile
def cut_stripes(a: Attacker) -> None:
    """Striped calls, one of whose lines the client closes in the middle: a stripe's, or the call's."""
    for number in range(20):
        with suppress(OSError):
            call = _striped_call(a, 4)
            call.send_call()
            call.join()
            call.send_pieces([0, 1])
            line = call.control if number % 2 else a.random.choice(call.stripes)
            line.shutdown()
            call.end_pieces()
            call.receive_results()
