"""How the host's memory is shared out."""

from __future__ import annotations

import pytest

from deconvd_server.budgets import LEAST_MESSAGE_BYTES, Budgets, budgets
from deconvd_server.machine import memory_bytes

MIB, GIB = 1 << 20, 1 << 30
PROCESS_BYTES = 32 * MIB
"""What a server takes that has served a small call on the processor, as the kernel charges it."""


@pytest.mark.parametrize("whole_bytes", [512 * MIB, 600 * MIB, GIB, 24 * GIB, 2048 * GIB])
def test_the_parts_leave_the_process_room_of_its_own(whole_bytes: int) -> None:
    parts = Budgets.of(whole_bytes)

    common_bytes = parts.shared_memory_bytes + parts.streams_bytes + parts.messages_bytes
    on_processor_bytes = common_bytes + parts.device_bytes + 4 * parts.pool_bytes
    on_eight_cards_bytes = (
        common_bytes + parts.spill_bytes + (3 + 8) * parts.pool_bytes + 8 * parts.card_results_bytes
    )
    assert on_processor_bytes <= whole_bytes - max(PROCESS_BYTES, whole_bytes // 16)
    assert on_eight_cards_bytes <= whole_bytes - max(PROCESS_BYTES, whole_bytes // 16)


def test_a_message_is_of_one_gibibyte_at_most_and_never_less_than_clients_send_in_one() -> None:
    assert Budgets.of(24 * GIB).largest_message_bytes == GIB
    assert Budgets.of(600 * MIB).largest_message_bytes == 75 * MIB
    assert Budgets.of(16 * MIB).largest_message_bytes == LEAST_MESSAGE_BYTES


def test_a_large_machine_keeps_what_is_worth_it() -> None:
    parts = Budgets.of(64 * GIB)

    assert (parts.pool_bytes, parts.card_results_bytes) == (256 * MIB, GIB)


def test_what_is_shared_out_is_what_this_machine_has() -> None:
    assert budgets() == Budgets.of(memory_bytes())
