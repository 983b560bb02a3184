"""Where the side socket is: its path, its file, and who may reach it."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deconvd.shared_memory import socket_beside
from deconvd.transport import unix_path

__all__ = ["Peer", "SideSocket", "memory_socket", "peer_of"]

_MAX_PATH_BYTES: Final = 107  # sun_path of sockaddr_un(7), less the final zero
_BACKLOG: Final = 64
_PROBE_TIMEOUT_S: Final = 1.0
_PEER: Final = struct.Struct("3i")  # struct ucred of unix(7)


_PRIVATE: Final = "deconvd-memory-"
"""How the names of private directories begin."""

_NAME: Final = "memory"


def memory_socket(addresses: Iterable[str]) -> Path:
    """Return where a server that listens on `addresses` should have its side socket.

    It is beside the first Unix socket that leaves room for it; else in a new directory of its own,
    which `SideSocket.remove` removes with it. What servers that were killed left of theirs is
    removed here.
    """
    for address in addresses:
        if own_path := unix_path(address):
            path = socket_beside(own_path)
            if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
                return Path(path).absolute()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir()
    for left in Path(directory).glob(f"{_PRIVATE}*/{_NAME}"):
        _remove_if_dead(left)
    return Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=directory)) / _NAME


def _remove_if_dead(path: Path) -> None:
    """Remove a socket on which no one listens, and its directory, if they are this user's."""
    with suppress(OSError):  # it is another's, or gone meanwhile
        if path.parent.lstat().st_uid == os.geteuid() and _is_dead(path):
            path.unlink()
            path.parent.rmdir()


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
    return False


class SideSocket:
    """A listening socket and its file.

    The file replaces whatever socket was there: its name belongs to whoever listens on the socket
    for calls beside it, and that one is taken with care (`deconvd_server.listen`).

    Args:
        path: At most 107 bytes.
        for_others: Whether processes of other users may connect, to be judged by their credentials.
        kind: Type of socket: of packets, or of a stream.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self, path: Path, *, for_others: bool, kind: socket.SocketKind = socket.SOCK_SEQPACKET
    ) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, kind)
        draft = path.with_name(f".{secrets.token_hex(4)}")
        try:
            if for_others and _is_private(path):
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
        if _is_private(self.path):
            with suppress(OSError):
                self.path.parent.rmdir()

    def _listen(self, draft: Path, mode: int) -> None:
        self.socket.setblocking(False)
        self.socket.bind(os.fspath(draft))
        draft.chmod(mode)
        self._inode = draft.stat().st_ino
        self.socket.listen(_BACKLOG)


def _is_private(path: Path) -> bool:
    return path.parent.name.startswith(_PRIVATE)


def _check_replaceable(path: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} is in the way of the socket for shared memory")


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
