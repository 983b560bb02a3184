"""Which servers there are: those that the target lists, and the addresses of names, which are looked up again."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.credentials import Credentials
from deconvd_client.server_set.balancer import Balancer, Member
from deconvd_client.server_set.replica import Replica
from deconvd_client.transports.targets import host_of, is_name_of_several, port_of, proxy_of

__all__ = ["Membership"]

_LOOKUP_INTERVAL_S: Final = 30.0
"""How often a name is looked up that is in use."""

_MIN_LOOKUP_INTERVAL_S: Final = 1.0
"""The same while one of its servers fails."""

_LANES_COUNT: Final = 16
"""As how many servers those behind a proxy appear. Each that is used has a connection to the proxy, and a session."""

_AFFINITY_HEADER: Final = "deconvd-affinity"
"""The header of all calls of a lane. A proxy that hashes it brings them to one server."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a server is.

    Attributes:
        target: A target for one server.
        given: The target that led there, as the caller has given it.
        lane: Which of the servers behind a proxy it is, which the proxy decides; None if there is no proxy.
    """

    target: str
    given: str
    lane: int | None = None

    @property
    def identity(self) -> bytes:
        """What tells it from others."""
        # whatever the proxy is called, all clients have the same lanes
        return (self.target if self.lane is None else f"lane {self.lane}").encode()


class Membership:
    """Keeps the members of a balancer those that the targets name. Thread-safe.

    Names are looked up by `socket.getaddrinfo`, so that the hosts file of the system counts, too. gRPC's own resolver
    does not say which addresses it has found, and each server must be known by its own.

    Args:
        targets: As `parse_targets` returns them.
        credentials: Those for each target. An address of a name has the credentials of the name, whose certificate its
            server must have.
        open_server: Returns the server at a target, with some credentials. Nothing is sent to it yet.
        open_lane: Returns those behind a proxy that a lane leads to, likewise.
        balancer: Gets the members.
    """

    def __init__(
        self,
        targets: Sequence[str],
        credentials: Mapping[str, Credentials],
        open_server: Callable[..., Replica],
        open_lane: Callable[..., Replica],
        balancer: Balancer[Replica],
    ) -> None:
        self._credentials = credentials
        self._open_server = open_server
        self._open_lane = open_lane
        self._balancer = balancer
        self._names = [target for target in targets if is_name_of_several(target)]
        self._fixed = [
            address
            for target in targets
            if target not in self._names
            for address in _fixed_addresses(target)
        ]
        self._looking = SharedTask()
        self._lookup_error: UnavailableError | None = None
        self._found: dict[str, list[_Address]] = {}  # by name, as of the last lookup that succeeded
        self._lookup_s = 0.0  # when the last lookup began; 0 if there was none
        self._has_failure = False
        self._adopt(self._fixed)

    def wait_for_names(self, deadline: Deadline) -> None:
        """Return once there are members.

        Raises:
            UnavailableError: No name can be looked up.
        """
        if self._balancer.configured:
            return
        self._looking.run(self.look_up, deadline.remaining_s())
        deadline.check_cancelled()
        if not self._balancer.configured:
            raise self._lookup_error or UnavailableError(
                f"{', '.join(self._names)}: the name server does not answer"
            )

    def note_failure(self) -> None:
        """Have the names looked up soon: a server fails, and may be somewhere else now."""
        self._has_failure = True

    def probe(self, member: Member[Replica], deadline: Deadline) -> str:
        """Return the health of a member."""
        return member.server.health(deadline)

    @property
    def next_lookup_s(self) -> float:
        """In how many seconds the names should be looked up; infinite if there are none."""
        if not self._names:
            return float("inf")
        interval_s = _MIN_LOOKUP_INTERVAL_S if self._has_failure else _LOOKUP_INTERVAL_S
        return max(self._lookup_s + interval_s - time.monotonic(), 0.0)

    def refresh(self) -> None:
        """Look the names up in the background."""
        self._looking.run(self.look_up, 0.0)

    def look_up(self) -> None:
        """Look the names up, and change the members accordingly. A name that is not found keeps its members."""
        self._lookup_s = time.monotonic()
        self._has_failure = False
        for name in self._names:
            try:
                self._found[name] = _resolve(name)
            except OSError as error:
                _log.debug("%s is not found: %s", name, error)
                self._lookup_error = UnavailableError(f"{name} cannot be looked up: {error}")
        found = [address for name in self._names for address in self._found.get(name, [])]
        self._adopt([*self._fixed, *found])

    def _adopt(self, addresses: list[_Address]) -> None:
        """Have the members be those at some addresses."""
        wanted = {address.identity: address for address in addresses}
        for member in self._balancer.configured:
            if member.identity not in wanted:
                _log.info("%s is no longer among the servers", member.identity.decode())
                self._balancer.retire(member)
        for identity, address in wanted.items():
            known = self._balancer.find(identity)
            self._balancer.add(known or Member(identity, self._open(address)))

    def _open(self, address: _Address) -> Replica:
        credentials = self._credentials[address.given]
        if address.lane is not None:
            credentials = credentials.with_header(_AFFINITY_HEADER, str(address.lane))
            return self._open_lane(address.target, credentials=credentials)
        if address.given != address.target:
            credentials = credentials.for_name(host_of(address.given))
        return self._open_server(address.target, credentials=credentials)


def _fixed_addresses(target: str) -> list[_Address]:
    proxy = proxy_of(target)
    if not proxy:
        return [_Address(target, target)]
    return [_Address(proxy, target, lane) for lane in range(_LANES_COUNT)]


def _resolve(name: str) -> list[_Address]:
    """Return the addresses of a name, in a fixed order. Raises OSError if there are none."""
    port = port_of(name)
    found = socket.getaddrinfo(host_of(name), port, type=socket.SOCK_STREAM)
    hosts = {str(where[0]) for *_, where in found}
    return [
        _Address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", name)
        for host in sorted(hosts)
    ]
