"""What hostile clients do by striped calls."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

from deconvd.direct.pieces import PIECE_BYTES
from deconvd.model.operation import DECONVOLVE
from tests.soak.hostile.attack import FOR_EVER_S, HELD_S, Attacker, hostile
from tests.stream_pairs import send_raw
from tests.striped_calls import StripedClient, describe

_SEND_S = 3.0
"""How long an attack sends to a server that does not receive."""

_OPERANDS = {
    "w": np.ones((2, 2, 1, 1), np.float32),
    "x": np.ones((18, 2, 256, 256), np.float32),
}
_ARRAYS = [*_OPERANDS.values()]
_PIECES_COUNT = 3


def _open(a: Attacker, stripes_count: int = 2) -> StripedClient:
    client = StripedClient(a.places.direct_port, stripes_count, a.source)
    a.held.callback(client.close)
    for line in (client.control, *client.stripes):
        line.set_deadline(_SEND_S)
    return client


def _begin(a: Attacker, stripes_count: int = 2) -> StripedClient:
    client = _open(a, stripes_count)
    client.begin(describe(DECONVOLVE, _OPERANDS), timeout_s=FOR_EVER_S)
    client.join()
    return client


@hostile
def stalled_stripes(a: Attacker) -> None:
    """Striped calls that stop: before any piece, between pieces, in a piece, or before the results."""
    for number in range(24):
        with suppress(OSError):  # of those that are too many
            client = _begin(a)
            match number % 4:
                case 1:
                    client.send(_ARRAYS, [0], ends=False)
                case 2:
                    head = client.stripes[1].protocol.begin_piece(1, PIECE_BYTES)
                    send_raw(client.stripes[1], head + bytes(a.random.randrange(PIECE_BYTES)))
                case 3:
                    client.send(_ARRAYS)
    time.sleep(HELD_S)


@hostile
def stripes_without_a_call(a: Attacker) -> None:
    """Stripes whose call never comes, each of a transfer of its own."""
    for _ in range(100):
        with suppress(OSError):
            client = _open(a)
            client.join()
            client.send(_ARRAYS[:1], ends=False)
    time.sleep(HELD_S)


@hostile
def wrong_pieces(a: Attacker) -> None:
    """Pieces that come twice, that are none of the call's, or of a wrong size, and calls that lack some."""
    for _ in range(30):
        with suppress(OSError):
            client = _begin(a)
            numbers = a.random.choices(range(_PIECES_COUNT), k=_PIECES_COUNT)
            client.send(_ARRAYS, numbers, ends=False)
            number = a.random.choice([0, 2, _PIECES_COUNT, 1 << 20, (1 << 64) - 1])
            elements = memoryview(bytes(a.random.randrange(1 << 16)))
            client.stripes[0].send_piece(number, [elements])
            client.send([])
            client.take_failure()


@hostile
def cut_stripes(a: Attacker) -> None:
    """Striped calls, one of whose lines the client closes in the middle: a stripe, or the control connection."""
    for number in range(20):
        with suppress(OSError):
            client = _begin(a, 4)
            client.send(_ARRAYS, [0, 1], ends=False)
            line = client.control if number % 2 else a.random.choice(client.stripes)
            line.shutdown()
            client.take_failure()
