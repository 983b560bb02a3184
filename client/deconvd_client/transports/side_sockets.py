"""Where a server's sockets beside those for gRPC are on this host."""

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
    """Return the paths where a server's sockets for direct calls are on this host.

    Args:
        info: What the server tells.
        grpc_path: The path by which it was reached.
    """
    return _find_local([side.calls for side in _side_sockets(info, grpc_path)], grpc_path)


def find_memory_socket(info: pb.GetServerInfoResponse, grpc_path: str) -> str:
    """Return the path where a server lends memory: on another host nobody is there. Empty if it lends none.

    Args:
        info: What the server tells.
        grpc_path: The path by which it was reached; empty if it was by TCP.

    Raises:
        UnavailableError: Another server lends memory there.
    """
    told = [side.memory for side in _side_sockets(info, grpc_path)] if grpc_path else []
    here = _find_local([*told, info.shared_memory_socket], grpc_path)
    path = here[0] if here else info.shared_memory_socket
    if here:
        _check_instance(path, bytes.fromhex(info.instance_id))
    return path


def _side_sockets(info: pb.GetServerInfoResponse, grpc_path: str) -> list[pb.SideSockets]:
    """Return what is beside a server's sockets: first, beside the one of the same name as the one in use."""
    name = os.path.basename(os.path.realpath(grpc_path))
    pairs = zip(info.unix_sockets, info.side_sockets, strict=False)
    return [side for _, side in sorted(pairs, key=lambda pair: os.path.basename(pair[0]) != name)]


def _find_local(told: Iterable[str], grpc_path: str) -> list[str]:
    """Return the paths of those sockets that are here: names are looked for beside the socket in use."""
    directories = dict.fromkeys(map(os.path.dirname, (os.path.realpath(grpc_path), grpc_path)))
    paths = [os.path.join(directory, one) for directory in directories for one in told if one]
    return [path for path in dict.fromkeys(paths) if _is_socket(path)]


def _is_socket(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISSOCK(mode) and is_valid_unix_path(path)


def _check_instance(path: str, instance: bytes) -> None:
    """Raise UnavailableError if another server than the one that is meant lends memory at a path.

    One that does not say, since it serves other users, will refuse to lend as well.
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
            return  # who borrows finds out what it is
    if reply.status is ReplyStatus.DONE and reply.region != instance:
        raise UnavailableError(f"another server lends memory at {path}")
