"""What a daemon is told when it starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from deconvd_server.residents import ResidentLimits
from deconvd_server.resources.socket_file import Access

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a daemon is told when it starts.

    Attributes:
        addresses: Where to listen; see `bind`.
        max_message_bytes: The largest request and the largest response.
        drain_timeout_s: How long calls under way may take to end once the daemon drains.
        shared_memory_bytes: How much memory to lend to clients on this host; 0 for none.
        shared_memory_users: Ids of the users to lend it to, beside the server's own and root.
        access: Who may open the Unix sockets; None for whom the process's umask lets.
        residents: How much may stay between calls, and for how long.
        takes_direct_calls: Whether calls are taken without gRPC, too.
        direct_port: The TCP port for them, on the hosts of `addresses`; 0 for any free one.
    """

    addresses: Sequence[str]
    max_message_bytes: int
    drain_timeout_s: float
    shared_memory_bytes: int = 0
    shared_memory_users: Collection[int] = ()
    residents: ResidentLimits = field(default_factory=ResidentLimits)
    takes_direct_calls: bool = True
    direct_port: int = 0
    access: Access | None = None
