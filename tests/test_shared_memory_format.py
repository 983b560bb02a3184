"""Packets on the side socket: what one side writes the other reads, and garbage is seen to be none."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
    card_id,
)

_REGIONS = st.binary(min_size=16, max_size=16)
_SIZES = st.integers(0, 2**64 - 1)


@given(st.builds(LendingRequest, st.sampled_from(LendingOperation), _SIZES, _REGIONS))
def test_a_request_is_read_as_it_was_written(request: LendingRequest) -> None:
    assert LendingRequest.parse(request.pack()) == request


@given(
    st.builds(LendingReply, st.sampled_from(ReplyStatus), _SIZES, _REGIONS, st.text(max_size=200))
)
def test_a_reply_is_read_as_it_was_written(reply: LendingReply) -> None:
    assert LendingReply.parse(reply.pack()) == reply


def test_the_format_is_what_the_specification_says() -> None:
    packet = LendingRequest(LendingOperation.LEND, 0x0102, bytes(range(16))).pack()

    assert packet == b"dcm1\x01\0\0\0" + b"\x02\x01" + bytes(6) + bytes(range(16))


def test_a_text_that_is_too_long_is_cut() -> None:
    packet = LendingReply(ReplyStatus.FAILED, text="ü" * MAX_REPLY_BYTES).pack()

    assert len(packet) == MAX_REPLY_BYTES
    assert LendingReply.parse(packet).text.startswith("üüü")


@given(st.binary(max_size=100))
def test_garbage_is_no_request_and_no_reply(packet: bytes) -> None:
    for kind in (LendingRequest, LendingReply):
        with suppress(ValueError):
            kind.parse(packet)
            assert packet.startswith(b"dcm1")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        LendingRequest(LendingOperation.LEND, 1).pack()[:-1],
        LendingRequest(LendingOperation.LEND, 1).pack() + b"\0",
        b"dcm2" + LendingRequest(LendingOperation.LEND, 1).pack()[4:],
        b"dcm1\x07" + LendingRequest(LendingOperation.LEND, 1).pack()[5:],
    ],
)
def test_what_is_not_quite_a_request_is_refused(packet: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        LendingRequest.parse(packet)


@given(
    uuid=st.binary(min_size=16, max_size=16), behind=st.lists(st.binary(max_size=20), min_size=2)
)
def test_all_processes_call_a_card_the_same(uuid: bytes, behind: list[bytes]) -> None:
    """As CuPy tells a UUID: up to the first zero, and on into what lies behind it where it has none."""
    ids = {card_id((uuid + after + bytes(1)).split(b"\0")[0]) for after in behind}

    assert len(ids) == 1
    (card,) = ids
    asked = LendingRequest(LendingOperation.LEND_ON_CARD, 1, card)
    assert LendingRequest.parse(asked.pack()).region == card
