"""What a card's device holds, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd_server.device.cuda.api.memory import MemoryStats
from deconvd_server.device.cuda.plans.plan_cache import PlanCacheStats
from deconvd_server.device.protocol import CacheState

__all__ = ["CudaStats"]


@dataclass(frozen=True, slots=True)
class CudaStats:
    """What a device holds now.

    Attributes:
        plans: The plans.
        plans_limit_bytes: What they may take.
        memory: What calls and tensors take of the card's memory.
        held_bytes: The card's memory that is held, in use or kept for the next call.
        held_for_calls_bytes: The part of it that is for calls: of what clients keep nobody else is told.
        held_limit_bytes: What may be held.
        made_count: Blocks that no kept one could serve.
        pinned_count: Sets of pinned host buffers.
        pinned_bytes: What they take.
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

    @property
    def caches(self) -> tuple[CacheState, ...]:
        """The same, as every device tells it."""
        return self._plans, self._device_buffers, self._pinned_buffers

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
