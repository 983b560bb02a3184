"""The nearest way to a server: a Unix socket, where client and server are on one host.

    FAR --found--> NEAR --lost--> FAR for good

What is lost once is not looked for again: a server that comes and goes is better served steadily.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from deconvd.errors import DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.stub import Stub

__all__ = ["Nearest", "Transport"]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Transport(StrEnum):
    """Which way tensors go."""

    AUTO = "auto"
    """The nearest that works."""

    SHARED_MEMORY = "shared_memory"
    """Those that are not small in memory that the server lends; messages go the nearest way."""

    UNIX = "unix"
    """By a Unix socket of the server's."""

    TCP = "tcp"
    """By TCP to the host of the target, which is no Unix socket."""

    GRPC = "grpc"
    """By gRPC to the target, and nothing beside it."""


class Nearest:
    """Runs calls by the nearest way to a server that works.

    Args:
        open_stub: Returns a stub for a target; nothing is sent yet.
        target: Where the server can be reached in any case.
        transport: Whether to look for a nearer way, and whether there must be one.

    Raises:
        InvalidArgumentError: `transport` is no way to such a target.
    """

    def __init__(self, open_stub: Callable[[str], Stub], target: str, transport: Transport) -> None:
        self._far = open_stub(target)
        is_unix = target.startswith("unix:")
        if is_unix and transport is Transport.TCP:
            self._far.close()
            raise InvalidArgumentError(
                f"transport tcp must have a target of the form host:port, got {target}",
                argument="transport",
            )
        self._open_stub = open_stub
        self._lock = threading.Lock()
        self._must_be_near = transport is Transport.UNIX and not is_unix
        self._is_final = is_unix or transport in (Transport.TCP, Transport.GRPC)
        self._near: Stub | None = None

    def call(self, work: Callable[[Stub], _T]) -> _T:
        """Return what `work` returns for the nearest stub; if that has no server, for the far one.

        Raises:
            DeconvdError: What `work` raised, or the server when it was asked for nearer ways.
            UnavailableError: There must be a nearer way, and there is none.
        """
        near = self._found()
        if near is None:
            return work(self._far)
        try:
            return work(near)
        except UnavailableError as error:
            if self._must_be_near:
                raise
            self._lose(near, error)
        return work(self._far)

    @property
    def far(self) -> Stub:
        """The stub of the target as it was given."""
        return self._far

    @property
    def last_ledger(self) -> dict[str, int]:
        """See `Stub.last_ledger`."""
        near = self._near
        return (near and near.last_ledger) or self._far.last_ledger

    def close(self) -> None:
        """Close both ways."""
        self._far.close()  # first, since whoever looks for a nearer way asks there under the lock
        with self._lock:
            self._is_final = True
            if self._near is not None:
                self._near.close()

    def _found(self) -> Stub | None:
        """Return the near stub, if there is one; look for it until the server has answered.

        While one thread looks others go the far way, unless there must be a near one.
        """
        if not self._is_final and self._lock.acquire(blocking=self._must_be_near):
            try:
                if not self._is_final:
                    self._look()
            finally:
                self._lock.release()
        return self._near

    def _look(self) -> None:
        info = self._far.get_server_info()
        here = [path for path in info.unix_sockets if Path(path).is_socket()]
        stubs = (self._verified(f"unix:{path}", info.instance_id) for path in here)
        self._near = next(filter(None, stubs), None)
        if self._near is None and self._must_be_near:
            raise UnavailableError(f"no call can go by a Unix socket: {_why_not(info, here)}")
        self._is_final = True

    def _verified(self, target: str, instance_id: str) -> Stub | None:
        """Return a stub of a target if the same server answers there."""
        stub = self._open_stub(target)
        try:
            if stub.get_server_info().instance_id == instance_id:
                _log.debug("calls go by %s", target)
                return stub
        except DeconvdError as error:
            _log.debug("not by %s: %s", target, error)
        stub.close()
        return None

    def _lose(self, near: Stub, error: UnavailableError) -> None:
        with self._lock:
            if self._near is near:
                _log.warning("the server's Unix socket is gone, calls go by its target: %s", error)
                self._near = None
                near.close()


def _why_not(info: pb.GetServerInfoResponse, here: list[str]) -> str:
    if not info.unix_sockets:
        return "the server listens at none"
    if not here:
        return (
            f"the server's, {', '.join(info.unix_sockets)}, are on another host or in a container"
        )
    return f"another server, or none, answers at {', '.join(here)}"
