"""The settings of a daemon."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.residents import ResidentLimits
from deconvd_server.resources.socket_file import Access

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a daemon, which it gets when it starts.

    Attributes:
        addresses: The addresses to listen on. See `bind`.
        max_message_bytes: The largest request and the largest response.
        drain_timeout_s: How long calls under way may take to end once the daemon drains.
        shared_memory_bytes: How much memory it lends to clients on this host; 0 to lend none.
        shared_memory_users: The ids of the users who may borrow it, in addition to the server's own user and root.
        residents: How much memory residents may take, and for how long they stay.
        takes_direct_calls: Whether it accepts direct connections.
        direct_port: The TCP port for them, on the hosts of `addresses`; 0 for any free port.
        access: Who may open the Unix sockets; None to leave that to the process's umask.
        authenticator: Says who a caller is.
        tls: How connections by TCP are encrypted; None if they are not.
        queue_wait_s: How long a call may wait for others; None for the default of `WaitLimit`.
        health_port: The TCP port where health alone is served, in plain text and without credentials, on the hosts of
            `addresses`; 0 for any free port, None for none.
        metrics_port: The TCP port where metrics are served, on the same hosts; 0 for any free port, None for none.
        metrics_readers: The identities that see the metrics of all tenants. Others see those of their own calls.
        shares_ports: Whether other processes of this user may listen on the same TCP ports.
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
    authenticator: Authenticator = field(default_factory=Authenticator)
    tls: ServerTls | None = None
    queue_wait_s: float | None = None
    health_port: int | None = None
    metrics_port: int | None = None
    metrics_readers: Collection[str] = ()
    shares_ports: bool = False
