"""Finds a server's side sockets on this host: those for direct connections and for lending memory."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable
from typing import Final

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

__all__ = ["find_call_sockets", "find_memory_socket"]

_IDENTIFY_TIMEOUT_S: Final = 1.0


def find_call_sockets(info: pb.GetServerInfoResponse, grpc_path: str) -> list[str]:
    """Return the paths of a server's sockets for direct connections on this host.

    Args:
        info: The server's GetServerInfo response.
        grpc_path: The path of the gRPC socket by which the server was reached.
    """
    return _find_local([side.calls for side in _side_sockets(info, grpc_path)], grpc_path)


def find_memory_socket(info: pb.GetServerInfoResponse, grpc_path: str) -> str:
    """Return the path of a server's lending socket; empty if it lends no memory.

    The path of a server on another host is returned as it is: no socket will be found there.

    Args:
        info: The server's GetServerInfo response.
        grpc_path: The path of the gRPC socket by which the server was reached; empty if it was reached by TCP.

    Raises:
        UnavailableError: Another server lends memory at this path.
    """
    names = [side.memory for side in _side_sockets(info, grpc_path)] if grpc_path else []
    here = _find_local([*names, info.shared_memory_socket], grpc_path)
    path = here[0] if here else info.shared_memory_socket
    if here:
        _check_instance(path, bytes.fromhex(info.instance_id))
    return path


def _side_sockets(info: pb.GetServerInfoResponse, grpc_path: str) -> list[pb.SideSockets]:
    """Return the side sockets of each gRPC socket of a server; first those of the socket that has the name in use."""
    name = os.path.basename(os.path.realpath(grpc_path))
    pairs = zip(info.unix_sockets, info.side_sockets, strict=False)
    return [side for _, side in sorted(pairs, key=lambda pair: os.path.basename(pair[0]) != name)]


def _find_local(names: Iterable[str], grpc_path: str) -> list[str]:
    """Return the paths of the sockets that exist on this host. Names without a folder are next to the gRPC socket."""
    # both where the path leads and where its links lead: either may be mounted from another container
    directories = dict.fromkeys(map(os.path.dirname, (os.path.realpath(grpc_path), grpc_path)))
    paths = [os.path.join(directory, one) for directory in directories for one in names if one]
    return [path for path in dict.fromkeys(paths) if _is_socket(path)]


def _is_socket(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISSOCK(mode) and is_valid_unix_path(path)


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
