"""What a server has done and what it has in use, as it counts this and as it reports it to clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["BUCKETS_COUNT", "MemoryUse", "MethodCounts", "ServerCounts", "StageTimes"]

BUCKETS_COUNT: Final = 28
"""The buckets of a histogram: for times of less than 1, 2, 4, … 2^26 microseconds (67 s), and for others."""


@dataclass(frozen=True, slots=True)
class MethodCounts:
    """The calls of one method by one transport.

    Attributes:
        method: The name of the RPC.
        transport: ``shared_memory``, ``unix``, ``tcp`` or ``grpc``.
        ended: How many calls have ended, by the names of their statuses.
        running_count: Calls that have not ended, including those that wait.
        received_bytes: The size of the operands that clients have sent, or written into shared memory.
        sent_bytes: The size of the results that the server has sent, or written there.
    """

    method: str
    transport: str
    ended: Mapping[str, int]
    running_count: int
    received_bytes: int
    sent_bytes: int

    def to_message(self) -> pb.MethodCounts:
        """Return these counts as a message."""
        return pb.MethodCounts(
            method=self.method,
            transport=self.transport,
            ended=[pb.StatusCount(status=s, count=count) for s, count in self.ended.items()],
            running_count=self.running_count,
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
        )

    @classmethod
    def from_message(cls, message: pb.MethodCounts) -> MethodCounts:
        """Return the counts in a message."""
        return cls(
            method=message.method,
            transport=message.transport,
            ended={each.status: each.count for each in message.ended},
            running_count=message.running_count,
            received_bytes=message.received_bytes,
            sent_bytes=message.sent_bytes,
        )


@dataclass(frozen=True, slots=True)
class StageTimes:
    """How long one stage of calls took.

    Attributes:
        stage: Its name in the ledger, without the unit: ``queue``, ``upload``, ``compute``, ``download``, ``server``.
        count: How many calls had it.
        total_us: The time of all of them.
        counts: A histogram of at most `BUCKETS_COUNT` buckets. Bucket i counts the calls that took less than 2^i
            microseconds and are not in an earlier bucket. Those after the last bucket that is not 0 are left out.
    """

    stage: str
    count: int
    total_us: int
    counts: tuple[int, ...]

    def to_message(self) -> pb.StageTimes:
        """Return these times as a message."""
        return pb.StageTimes(
            stage=self.stage, count=self.count, total_us=self.total_us, counts=self.counts
        )

    @classmethod
    def from_message(cls, message: pb.StageTimes) -> StageTimes:
        """Return the times in a message."""
        return cls(message.stage, message.count, message.total_us, tuple(message.counts))


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """How much of a budget of host memory is in use.

    Attributes:
        name: What the budget is for: ``messages``, ``streams``, ``pools`` of memory for the next call, ``shared
            memory``, or the whole ``process``, whose limit is the machine's memory.
        used_bytes: What is in use.
        limit_bytes: The budget.
    """

    name: str
    used_bytes: int
    limit_bytes: int

    def to_message(self) -> pb.MemoryUse:
        """Return this use as a message."""
        return pb.MemoryUse(
            name=self.name, used_bytes=self.used_bytes, limit_bytes=self.limit_bytes
        )

    @classmethod
    def from_message(cls, message: pb.MemoryUse) -> MemoryUse:
        """Return the use in a message."""
        return cls(message.name, message.used_bytes, message.limit_bytes)


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """What a server has done for its clients since it started, and what it has in use now.

    Attributes:
        uptime_us: How long the server has been running.
        methods: One for each method and transport with calls so far: those of the caller's identity, if it has proved
            one, else those of all callers.
        stages: The stages of those of these calls that have waited for a device or used one.
        memory: The budgets of host memory.
        sessions_count: Open sessions.
        direct_connections_count: Direct connections.
        borrowers_count: Clients that are connected to borrow shared memory.
        running_streams_count: Streams and striped calls that have their memory.
        waiting_streams_count: Streams and striped calls that wait for it.
    """

    uptime_us: int
    methods: tuple[MethodCounts, ...]
    stages: tuple[StageTimes, ...]
    memory: tuple[MemoryUse, ...]
    sessions_count: int
    direct_connections_count: int
    borrowers_count: int
    running_streams_count: int
    waiting_streams_count: int

    def to_message(self) -> pb.ServerCounts:
        """Return these counts as a message."""
        plain = {field: getattr(self, field) for field in _PLAIN_FIELDS}
        return pb.ServerCounts(
            methods=[each.to_message() for each in self.methods],
            stages=[each.to_message() for each in self.stages],
            memory=[each.to_message() for each in self.memory],
            **plain,
        )

    @classmethod
    def from_message(cls, message: pb.ServerCounts) -> ServerCounts:
        """Return the counts in a message."""
        plain = {field: getattr(message, field) for field in _PLAIN_FIELDS}
        return cls(
            methods=tuple(map(MethodCounts.from_message, message.methods)),
            stages=tuple(map(StageTimes.from_message, message.stages)),
            memory=tuple(map(MemoryUse.from_message, message.memory)),
            **plain,
        )


_PLAIN_FIELDS: Final = tuple(
    field.name
    for field in fields(ServerCounts)
    if field.name not in ("methods", "stages", "memory")
)
