"""The regions that a borrower has, and the blocks that arrays take in them. No server here."""

from __future__ import annotations

from collections.abc import Callable

from deconvd_client.shared_memory.region import Block, Region, State

__all__ = ["Pool"]


class Pool:
    """Regions of borrowed memory. Its borrower calls the methods under one lock.

    Attributes:
        regions: All of them; replaced whole, so that it can be read without the lock.
    """

    def __init__(self) -> None:
        self.regions: tuple[Region, ...] = ()

    @property
    def open_bytes(self) -> int:
        """Size of the regions that take new blocks: those that broken calls have closed go back soon."""
        return sum(region.size_bytes for region in self.regions if region.state is State.OPEN)

    def take_again(self, size_bytes: int) -> Block | None:
        """Return a block that has just gone, if it is of the right size and nothing is to be tidied."""
        for region in self.regions:
            if region.state is State.CLOSED:
                return None
        for region in self.regions:
            block = region.take_again(size_bytes)
            if block is not None:
                return block
        return None

    def take(self, size_bytes: int) -> Block | None:
        """Return a new block; None if there is no room for it."""
        for region in self.regions:
            block = region.take(size_bytes)
            if block is not None:
                return block
        return None

    def collect(self) -> None:
        """Make room of the blocks that have gone."""
        for region in self.regions:
            region.collect()

    def recover(self) -> None:
        """Make room of all blocks that have gone, of those too that an interrupt has kept from being used."""
        for region in self.regions:
            region.recover()

    @property
    def has_waste(self) -> bool:
        """Whether a region is to be given back: it takes no new blocks, and has none."""
        return any(region.is_empty and region.state is State.CLOSED for region in self.regions)

    def add(self, region: Region) -> None:
        """Add a region that was borrowed."""
        self.regions += (region,)

    def withdraw(self, is_unused: Callable[[Region], bool]) -> list[Region]:
        """Remove empty regions, and return them, to be given back."""
        self.recover()
        unused = [region for region in self.regions if region.is_empty and is_unused(region)]
        self.regions = tuple(region for region in self.regions if region not in unused)
        return unused

    def clear(self) -> None:
        """Forget all regions."""
        self.regions = ()
