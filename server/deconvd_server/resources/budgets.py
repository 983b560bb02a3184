"""How the host's memory is divided by default. All parts together are less than the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from deconvd.host.machine import memory_bytes

__all__ = ["LEAST_MESSAGE_BYTES", "PROCESS_BYTES", "Budgets", "budgets"]

PROCESS_BYTES: Final = 160 << 20
"""Memory for the process itself, however small the machine is.

Its modules take 30 MB. The rest is for the stacks of its threads, and for buffers and bookkeeping of as many
connections, calls and tensors as it accepts. The soak test checks that this is enough.
"""

LEAST_MESSAGE_BYTES: Final = 4 << 20
"""Smallest limit for a message: what clients send by default, which is gRPC's default limit, must fit."""

_LARGEST_MESSAGE_BYTES: Final = 1 << 30
_LARGEST_POOL_BYTES: Final = 256 << 20
_LARGEST_REGISTERED_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Budgets:
    """The parts of the host's memory, after `PROCESS_BYTES` are taken off.

    If the device is the CPU, seven eighths are given to the parts below, and at most a sixteenth to pools. The rest,
    at least a sixteenth, is for what nobody counts. If the devices are cards, `spill_bytes`, a second
    `messages_bytes` and `registered_bytes` take the place of `device_bytes`.

    Attributes:
        device_bytes: Five sixteenths, for calls on the CPU and resident tensors.
        shared_memory_bytes: A quarter, lent to clients.
        streams_bytes: Three sixteenths, for the tensors of streams. A large sample is a slice of its own.
        messages_bytes: An eighth, for the requests and responses of calls.
        spill_bytes: An eighth, for resident tensors that are spilled from cards.
        largest_message_bytes: `messages_bytes`, but at most 1 GiB.
        pool_bytes: A 64th, at most 256 MiB, for each of four pools of reused memory, or for the plans of a card.
        registered_bytes: A 32nd, at most 4 GiB, for registered memory that all cards together keep for the next calls.
            On a host with 64 GiB it holds the operands and results of 16 calls of 100 MB. Arrays in use count for the
            part that their call is admitted to. They take up to an eighth more than that, since their sizes are
            rounded up; that is for the part that nobody counts.
    """

    device_bytes: int
    shared_memory_bytes: int
    streams_bytes: int
    messages_bytes: int
    spill_bytes: int
    largest_message_bytes: int
    pool_bytes: int
    registered_bytes: int

    @staticmethod
    def of(whole_bytes: int) -> Budgets:
        """Return the parts of that much memory. The process itself gets half of it at most."""
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
            registered_bytes=min(shared_out_bytes // 32, _LARGEST_REGISTERED_BYTES),
        )


@lru_cache(1)
def budgets() -> Budgets:
    """Return the parts of this machine's memory, as it was at the first call."""
    return Budgets.of(memory_bytes())
