"""What the engine asks of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deconvd.cache_state import CacheState
from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.call import Call

__all__ = ["CacheState", "Device", "DeviceInfo"]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is.

    Attributes:
        id: As in the server's ``--device``: ``cpu``, ``cuda:0``.
        name: The maker's name for it.
        memory_bytes: What it has in all.
        threads_count: Threads that compute on it; 0 on a GPU.
        budget_bytes: What the calls under way may take of its memory, all together.
        calls_count: How many calls it computes at once; more would only wait inside it.
    """

    id: str
    name: str
    memory_bytes: int
    threads_count: int
    budget_bytes: int
    calls_count: int


class Device(Protocol):
    """Computes deconvolutions of arrays in host memory. Its methods may be called from many threads.

    The arrays have the shapes and element types of the problem, native byte order and any strides;
    they may be read-only and are never modified. Results are new C-contiguous arrays.

    Every method raises CallCancelledError or DeadlineError soon after the call has ended, and
    ExhaustedError if memory runs out; the device stays usable.
    """

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""

    @property
    def caches(self) -> Sequence[CacheState]:
        """What it keeps between calls, now."""

    def footprint_bytes(self, problem: Problem, wanted: Wanted | None) -> int:
        """Return a bound on the device memory that a call takes, its operands and results included.

        Args:
            wanted: The gradients that the call is for; None if it is for y.
        """

    def deconvolve(
        self, problem: Problem, x: Array, W: Array, b: Array | None, options: Options, call: Call
    ) -> Array:
        """Return y."""

    def gradients(
        self,
        problem: Problem,
        x: Array | None,
        W: Array | None,
        gy: Array,
        wanted: Wanted,
        options: Options,
        call: Call,
    ) -> Gradients:
        """Return the wanted gradients.

        Args:
            x: May be None unless gW is wanted.
            W: May be None unless gx is wanted.
        """

    def close(self) -> None:
        """Free what the device holds. No call may be running, and none may follow."""
