"""Unix sockets beside that for gRPC: their files, and who may reach them."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Peer", "SideSocket", "peer_of"]

_BACKLOG: Final = 64
_PEER: Final = struct.Struct("3i")  # struct ucred of unix(7)


class SideSocket:
    """A listening socket and its file.

    The file replaces whatever socket was there: its name belongs to whoever listens on the socket
    for calls beside it, and that one is taken with care (`deconvd_server.listen`).

    Args:
        path: At most 107 bytes.
        for_others: Whether processes of other users may connect, to be judged by their credentials.
        kind: Type of socket: of packets, or of a stream.
        has_directory: Whether its directory is its own, and to be removed with it.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self, path: Path, *, kind: socket.SocketKind, for_others: bool, has_directory: bool = False
    ) -> None:
        self.path = path
        self._has_directory = has_directory
        self.socket = socket.socket(socket.AF_UNIX, kind)
        draft = path.with_name(f".{secrets.token_hex(4)}")
        try:
            if for_others and has_directory:
                path.parent.chmod(0o711)
            self._listen(draft, 0o666 if for_others else 0o600)
            _check_replaceable(path)
            draft.rename(path)  # at once, and with the right mode
        except BaseException:
            self.socket.close()
            draft.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Remove the file, unless a successor has replaced it. What is left is to close the socket."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        if self._has_directory:
            with suppress(OSError):
                self.path.parent.rmdir()

    def _listen(self, draft: Path, mode: int) -> None:
        self.socket.setblocking(False)
        self.socket.bind(os.fspath(draft))
        draft.chmod(mode)
        self._inode = draft.stat().st_ino
        self.socket.listen(_BACKLOG)


def _check_replaceable(path: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} is in the way of a socket")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as the kernel saw it then."""

    process: int
    user: int

    def __str__(self) -> str:
        return f"process {self.process} of user {self.user}"


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    process, user, _group = _PEER.unpack(credentials)
    return Peer(process, user)
