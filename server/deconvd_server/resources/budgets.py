"""How the host's memory is shared out, unless options say otherwise: all parts together are less than the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from deconvd_server.resources.machine import memory_bytes

__all__ = ["LEAST_MESSAGE_BYTES", "PROCESS_BYTES", "Budgets", "budgets"]

PROCESS_BYTES: Final = 160 << 20
"""What a process takes itself, however small the machine is: its modules, 30 MB, and beside them the stacks of its
threads, and buffers and bookkeeping for as many connections, calls and tensors as it takes. The soak holds it to that.
"""

LEAST_MESSAGE_BYTES: Final = 4 << 20
"""What clients send in one message, gRPC's own default, must fit."""

_LARGEST_MESSAGE_BYTES: Final = 1 << 30
_LARGEST_POOL_BYTES: Final = 256 << 20
_LARGEST_RESULTS_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Budgets:
    """The parts of what the host has of memory beside the process's own, `PROCESS_BYTES`.

    Where the processor computes, seven eighths are given out, and a sixteenth to pools at most; what is left, a
    sixteenth or more, is for what nobody counts. Where cards do, `spill_bytes`, `messages_bytes` once more and what
    cards keep on the host take the place of `device_bytes`.

    Attributes:
        device_bytes: Five sixteenths, for calls on the processor and tensors that stay there.
        shared_memory_bytes: A quarter, lent to clients.
        streams_bytes: Three sixteenths, for what streams hold of their tensors: a large sample is a slice of its own.
        messages_bytes: An eighth, for what calls hold of requests and responses.
        spill_bytes: An eighth, for tensors that cards have no room for.
        largest_message_bytes: What messages have, 1 GiB at most.
        pool_bytes: A 64th, 256 MiB at most, for each of four pools of memory that was freed and is used again, or for
            a card's plans.
        card_results_bytes: A 64th, 1 GiB at most, for what each card keeps for results.
    """

    device_bytes: int
    shared_memory_bytes: int
    streams_bytes: int
    messages_bytes: int
    spill_bytes: int
    largest_message_bytes: int
    pool_bytes: int
    card_results_bytes: int

    @staticmethod
    def of(whole_bytes: int) -> Budgets:
        """Return the parts of as much memory, less the process's own: that is half of it at most."""
        shared_out_bytes = max(whole_bytes - PROCESS_BYTES, whole_bytes // 2)
        eighth_bytes = shared_out_bytes // 8
        messages_bytes = max(eighth_bytes, LEAST_MESSAGE_BYTES)
        return Budgets(
            device_bytes=5 * eighth_bytes // 2,
            shared_memory_bytes=2 * eighth_bytes,
            streams_bytes=3 * eighth_bytes // 2,
            messages_bytes=messages_bytes,
            spill_bytes=eighth_bytes,
            largest_message_bytes=min(messages_bytes, _LARGEST_MESSAGE_BYTES),
            pool_bytes=min(shared_out_bytes // 64, _LARGEST_POOL_BYTES),
            card_results_bytes=min(shared_out_bytes // 64, _LARGEST_RESULTS_BYTES),
        )


@lru_cache(1)
def budgets() -> Budgets:
    """Return the parts of this machine's memory, as it was when they were first asked for."""
    return Budgets.of(memory_bytes())
