"""What a device keeps of one kind between calls, as the server knows it and the client is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["CacheState"]


@dataclass(frozen=True, slots=True)
class CacheState:
    """What a device keeps of one kind between calls.

    Attributes:
        name: What it keeps: ``plans``.
        count: Entries.
        size_bytes: What they take.
        limit_bytes: What they may take.
        hits_count: Times that an entry was there when it was asked for.
        misses_count: Times that it had to be made.
    """

    name: str
    count: int
    size_bytes: int
    limit_bytes: int
    hits_count: int
    misses_count: int

    def to_message(self) -> pb.Cache:
        """Return the message for it."""
        return pb.Cache(**asdict(self))

    @classmethod
    def from_message(cls, message: pb.Cache) -> CacheState:
        """Return what a message says."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})
