"""Statistics of a card's device: its plans, its memory, and the caches that every device reports."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd_server.device.cuda.api.memory import MemoryStats
from deconvd_server.device.cuda.plans.plan_cache import PlanCacheStats
from deconvd_server.device.protocol import CacheState

__all__ = ["CudaStats"]


@dataclass(frozen=True, slots=True)
class CudaStats:
    """The plans and memory that a device holds now.

    Attributes:
        plans: Statistics of the plan cache.
        plans_limit_bytes: Bound on the host memory of plans.
        memory: Use of the card's memory by calls and residents.
        held_bytes: The card's memory that is in use, or kept for the next call.
        held_for_calls_bytes: The part of it that is for calls. Only this part is reported to clients: how much a
            tenant's residents take concerns nobody else.
        held_limit_bytes: Bound on `held_bytes`.
        misses_count: Blocks for calls that no kept block could serve.
        pinned_count: Lanes with pinned host buffers.
        pinned_bytes: Size of these buffers.
        host_buffers: The registered memory that all cards keep for arrays on the host.
    """

    plans: PlanCacheStats
    plans_limit_bytes: int
    memory: MemoryStats
    held_bytes: int
    held_for_calls_bytes: int
    held_limit_bytes: int
    misses_count: int
    pinned_count: int
    pinned_bytes: int
    host_buffers: CacheState

    @property
    def caches(self) -> tuple[CacheState, ...]:
        """The same, in the form that every device reports."""
        return self._plans, self._device_buffers, self._pinned_buffers, self.host_buffers

    @property
    def _plans(self) -> CacheState:
        cache = self.plans.cache
        return CacheState(
            name="plans",
            count=cache.count,
            size_bytes=cache.size_bytes,
            limit_bytes=self.plans_limit_bytes,
            hits_count=cache.hits_count,
            misses_count=cache.misses_count,
            evictions_count=cache.evictions_count,
        )

    @property
    def _device_buffers(self) -> CacheState:
        return CacheState(
            name="device buffers",
            count=self.memory.blocks_count,
            size_bytes=self.held_for_calls_bytes,
            limit_bytes=self.held_limit_bytes,
            hits_count=max(self.memory.leased_count - self.misses_count, 0),
            misses_count=self.misses_count,
        )

    @property
    def _pinned_buffers(self) -> CacheState:
        return CacheState(
            name="pinned buffers",
            count=self.pinned_count,
            size_bytes=self.pinned_bytes,
            limit_bytes=self.pinned_bytes,
            hits_count=0,
            misses_count=0,
        )
