"""Finds a server's sockets on this host: those for gRPC, for direct connections and for lending memory.

A client with credentials trusts what a server says, but not what is at the paths that it names: on another host, or in
another container, that may be anyone's socket. So it uses only sockets that belong to whom it trusts.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, TypeAlias

from deconvd.errors import UnavailableError
from deconvd.host.system import is_valid_unix_path
from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.responses import malformed_response

__all__ = [
    "Owners",
    "any_owner",
    "find_call_sockets",
    "find_memory_socket",
    "find_worker_sockets",
    "instance_of",
    "is_trusted_socket",
    "trusted_owners",
]

Owners: TypeAlias = Callable[[], frozenset[int] | None]
"""Returns the users whose socket files are used; None for anyone's."""

_IDENTIFY_TIMEOUT_S: Final = 1.0

_ROOT: Final = 0


def any_owner() -> frozenset[int] | None:
    """Return None: a client without credentials uses anyone's sockets."""
    return None


def trusted_owners(target_path: str = "") -> frozenset[int] | None:
    """Return whose sockets a client with credentials uses: root's, those of its own user, and of one more.

    Args:
        target_path: The Unix socket that the client was told to use, whose owner is trusted, too; empty if it was told
            to use TCP.
    """
    owners = {_ROOT, os.geteuid()} if hasattr(os, "geteuid") else {_ROOT}
    with suppress(OSError):  # it does not exist yet: then nothing is next to it
        if target_path:
            owners.add(os.stat(target_path).st_uid)
    return frozenset(owners)


def is_trusted_socket(path: str, owners: Owners = any_owner) -> bool:
    """Return whether there is a socket at a path, and it belongs to one of `owners`."""
    if not is_valid_unix_path(path):
        return False
    try:
        status = os.stat(path)
    except OSError:
        return False
    users = owners()
    return stat.S_ISSOCK(status.st_mode) and (users is None or status.st_uid in users)


def find_call_sockets(
    info: pb.GetServerInfoResponse, grpc_path: str, owners: Owners = any_owner
) -> list[str]:
    """Return the paths of a server's sockets for direct connections on this host.

    Args:
        info: The server's GetServerInfo response.
        grpc_path: The path of the gRPC socket by which the server was reached.
        owners: Whose sockets are used.
    """
    return _find_local([side.calls for side in _side_sockets(info, grpc_path)], grpc_path, owners)


def find_memory_socket(
    info: pb.GetServerInfoResponse, grpc_path: str, owners: Owners = any_owner
) -> str:
    """Return the path of a server's lending socket; empty if it lends no memory.

    The path of a server on another host is returned as it is: no socket will be found there. If there is one, but it
    belongs to somebody else, nothing is returned.

    Args:
        info: The server's GetServerInfo response.
        grpc_path: The path of the gRPC socket by which the server was reached; empty if it was reached by TCP.
        owners: Whose sockets are used.

    Raises:
        UnavailableError: Another server lends memory at this path.
    """
    names = [side.memory for side in _side_sockets(info, grpc_path)] if grpc_path else []
    here = _find_local([*names, info.shared_memory_socket], grpc_path, owners)
    if here:
        _check_instance(here[0], instance_of(info))
        return here[0]
    path = info.shared_memory_socket
    return "" if is_trusted_socket(path) else path


def find_worker_sockets(worker: pb.Worker, grpc_path: str, owners: Owners = any_owner) -> list[str]:
    """Return the paths of a worker's own sockets for gRPC on this host.

    Args:
        worker: As the server names it.
        grpc_path: The path of the gRPC socket by which the server was reached; empty if it was reached by TCP.
        owners: Whose sockets are used.
    """
    paths = [*worker.unix_sockets]
    if grpc_path:
        return _find_local(map(os.path.basename, paths), grpc_path, owners)
    return [path for path in paths if os.path.isabs(path) and is_trusted_socket(path, owners)]


def _side_sockets(info: pb.GetServerInfoResponse, grpc_path: str) -> list[pb.SideSockets]:
    """Return the side sockets of each gRPC socket of a server; first those of the socket that has the name in use."""
    name = os.path.basename(os.path.realpath(grpc_path))
    pairs = zip(info.unix_sockets, info.side_sockets, strict=False)
    return [side for _, side in sorted(pairs, key=lambda pair: os.path.basename(pair[0]) != name)]


def _find_local(names: Iterable[str], grpc_path: str, owners: Owners) -> list[str]:
    """Return the paths of the sockets that exist on this host. Names without a folder are next to the gRPC socket."""
    # both where the path leads and where its links lead: either may be mounted from another container
    directories = dict.fromkeys(map(os.path.dirname, (os.path.realpath(grpc_path), grpc_path)))
    paths = [os.path.join(directory, one) for directory in directories for one in names if one]
    return [path for path in dict.fromkeys(paths) if is_trusted_socket(path, owners)]


def instance_of(info: pb.GetServerInfoResponse) -> bytes:
    """Return the id of the instance that a response is from. Raises InternalError if it has none."""
    try:
        return bytes.fromhex(info.instance_id)
    except ValueError:
        raise malformed_response(
            pb.GetServerInfoResponse, f"its instance_id is {info.instance_id!r}"
        ) from None


def _check_instance(path: str, instance: bytes) -> None:
    """Raise UnavailableError if the server that lends memory at a path is another instance.

    A server that does not say which it is, since it serves other users, will refuse to lend, too.
    """
    if not hasattr(socket, "AF_UNIX"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_IDENTIFY_TIMEOUT_S)
        try:
            connection.connect(path)
            connection.send(LendingRequest(LendingOperation.IDENTIFY).pack())
            reply = LendingReply.parse(connection.recv(MAX_REPLY_BYTES))
        except TimeoutError:
            raise UnavailableError(f"the server does not answer at {path}") from None
        except (OSError, ValueError):
            return  # the borrower will find out what is wrong
    if reply.status is ReplyStatus.DONE and reply.region != instance:
        raise UnavailableError(f"another server lends memory at {path}")
