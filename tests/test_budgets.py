"""How the host's memory is shared out."""

from __future__ import annotations

import pytest

from deconvd.host.machine import memory_bytes
from deconvd_server.resources.budgets import LEAST_MESSAGE_BYTES, PROCESS_BYTES, Budgets, budgets

MB, MIB, GIB = 10**6, 1 << 20, 1 << 30


@pytest.mark.parametrize("whole_bytes", [512 * MIB, 600 * MB, GIB, 2 * GIB, 24 * GIB, 2048 * GIB])
def test_all_that_may_be_taken_is_less_than_there_is(whole_bytes: int) -> None:
    parts = Budgets.of(whole_bytes)

    common_bytes = PROCESS_BYTES + parts.shared_memory_bytes + parts.streams_bytes
    on_processor_bytes = (
        common_bytes + parts.device_bytes + parts.messages_bytes + 4 * parts.pool_bytes
    )
    assert on_processor_bytes <= whole_bytes - (whole_bytes - PROCESS_BYTES) // 16

    for cards_count in (1, 8) if whole_bytes > 64 * GIB else (1,):
        on_cards_bytes = (
            common_bytes
            + parts.spill_bytes
            + 2 * parts.messages_bytes
            + (3 + cards_count) * parts.pool_bytes
            + parts.registered_bytes
        )
        assert on_cards_bytes <= whole_bytes - (whole_bytes - PROCESS_BYTES) // 16


def test_a_machine_that_has_less_than_a_process_takes_gives_out_half() -> None:
    parts = Budgets.of(128 * MIB)

    assert parts.device_bytes == 20 * MIB
    assert parts.shared_memory_bytes == 16 * MIB


def test_the_parts_are_those_that_are_promised() -> None:
    sixteenth_bytes = 64 * MIB

    assert Budgets.of(PROCESS_BYTES + 16 * sixteenth_bytes) == Budgets(
        device_bytes=5 * sixteenth_bytes,
        shared_memory_bytes=4 * sixteenth_bytes,
        streams_bytes=3 * sixteenth_bytes,
        messages_bytes=2 * sixteenth_bytes,
        spill_bytes=2 * sixteenth_bytes,
        largest_message_bytes=2 * sixteenth_bytes,
        pool_bytes=sixteenth_bytes // 4,
        registered_bytes=sixteenth_bytes // 2,
    )


def test_a_message_is_of_one_gibibyte_at_most_and_never_less_than_clients_send_in_one() -> None:
    assert Budgets.of(24 * GIB).largest_message_bytes == GIB
    assert Budgets.of(600 * MIB).largest_message_bytes == 55 * MIB
    assert Budgets.of(16 * MIB).largest_message_bytes == LEAST_MESSAGE_BYTES == 4 * MIB


def test_a_large_machine_keeps_what_is_worth_it() -> None:
    parts = Budgets.of(129 * GIB)

    assert (parts.pool_bytes, parts.registered_bytes) == (256 * MIB, 4 * GIB)


def test_what_is_shared_out_is_what_this_machine_has() -> None:
    assert budgets() == Budgets.of(memory_bytes())
