"""The state of one of a device's caches, as the server reports it to clients."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["CacheState"]


@dataclass(frozen=True, slots=True)
class CacheState:
    """The state of a cache. A device has one cache for each kind of object that it keeps between calls.

    Attributes:
        name: The kind of object, for example ``plans``.
        count: Number of entries.
        size_bytes: Size of all entries.
        limit_bytes: Largest size of all entries.
        hits_count: How often a requested entry was in the cache.
        misses_count: How often it had to be created.
        evictions_count: How often an entry had to make room for others.
    """

    name: str
    count: int
    size_bytes: int
    limit_bytes: int
    hits_count: int
    misses_count: int
    evictions_count: int = 0

    def to_message(self) -> pb.Cache:
        """Return this state as a message."""
        return pb.Cache(**asdict(self))

    @classmethod
    def from_message(cls, message: pb.Cache) -> CacheState:
        """Return the state in a message."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})
