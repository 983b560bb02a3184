"""Unix sockets next to those for gRPC: where their files are, and which process connects to them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from deconvd.host.system import is_valid_unix_path
from deconvd_server.resources.socket_file import Access

__all__ = [
    "PeerCredentials",
    "SideSocket",
    "SocketPurpose",
    "open_private_socket",
    "open_side_sockets",
    "peer_credentials",
]

_BACKLOG: Final = 64
_UCRED: Final = struct.Struct("3i")  # struct ucred of unix(7)

_log = logging.getLogger(__name__)


class SocketPurpose(Enum):
    """What a side socket is for.

    Attributes:
        word: Part of the names of their files.
        kind: Socket type: stream or packets.
        loss: What clients on this host do without such a socket, for the log.
    """

    CALLS = "calls", socket.SOCK_STREAM, "make all calls by gRPC"
    MEMORY = "memory", socket.SOCK_SEQPACKET, "borrow no memory"

    def __init__(self, word: str, kind: socket.SocketKind, loss: str) -> None:
        self.word = word
        self.kind = kind
        self.loss = loss


class SideSocket:
    """A listening Unix socket and its file.

    It replaces whatever socket was at its path: that path belongs to the process that listens on the gRPC
    socket next to it, and the gRPC socket is taken over with care (`deconvd_server.transports.listen`). The
    socket is bound to the path that it keeps, not renamed to it: programs that clean up directories, such as
    systemd-tmpfiles, leave a socket alone if its path is in /proc/net/unix.

    Args:
        path: A path for which `is_valid_unix_path` is true.
        kind: Socket type.
        access: Who may open it; None to leave that to the process's umask.
        has_directory: Whether its directory is its own, and removed with it.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: socket.SocketKind,
        access: Access | None = None,
        has_directory: bool = False,
    ) -> None:
        self.path = path
        self._kind = kind
        self._access = access
        self._lock = threading.Lock()
        self._has_file = True
        self._directory = _lock_directory(path.parent) if has_directory else None
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            if has_directory and access is not None and access.is_for_others:
                path.parent.chmod(0o711)
            _remove_socket(path)
            self._listen(self.socket)
        except BaseException:
            self.socket.close()
            self._remove_directory()
            raise

    def remove(self) -> None:
        """Remove the file, unless a successor has replaced it. The caller then closes the socket.

        Further calls do nothing: once the socket is closed, a successor's file may have the same inode number.
        """
        with self._lock:
            had_file, self._has_file = self._has_file, False
        try:
            with suppress(FileNotFoundError):
                if had_file and self.path.stat().st_ino == self._inode:
                    self.path.unlink()
        except OSError as error:
            _log.warning("a socket's file cannot be removed: %s", error)
        self._remove_directory()

    def restore(self) -> bool:
        """Listen again if someone has removed the file; return whether that was so.

        The descriptor stays the same, but the thread that waits for connections must register it again.
        """
        with self._lock:
            if not self._has_file or os.path.lexists(self.path):
                return False
            try:
                with socket.socket(socket.AF_UNIX, self._kind) as replacement:
                    self._listen(replacement)
                    os.dup2(replacement.fileno(), self.socket.fileno(), inheritable=False)
            except OSError as error:
                _log.warning("%s was removed, and cannot be made again: %s", self.path, error)
                self._has_file = False
                return False
        _log.warning("%s was removed, and has been made again", self.path)
        return True

    def _remove_directory(self) -> None:
        """Remove its own directory, if it has one."""
        if self._directory is not None:
            with suppress(OSError):
                self.path.parent.rmdir()
            os.close(self._directory)
            self._directory = None

    def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        listener.bind(os.fspath(self.path))
        self._inode = self.path.stat().st_ino
        try:
            if self._access is not None:
                self._access.apply_to(self.path)  # before anyone can connect
            listener.listen(_BACKLOG)
        except BaseException:
            self.path.unlink()
            raise


def open_side_sockets(
    grpc_paths: Sequence[Path], purpose: SocketPurpose, access: Access | None
) -> dict[Path, SideSocket]:
    """Open a side socket next to each gRPC socket; return them by the path of the gRPC socket.

    If one cannot be opened, it is left out, and the log says why. A side socket has the name of the gRPC
    socket with a suffix, in the same directory, which containers may share. If that path would be too
    long, it is in a private directory.
    """
    opened: dict[Path, SideSocket] = {}
    for grpc_path in grpc_paths:
        try:
            path = _side_path(grpc_path, purpose, taken=grpc_paths)
            opened[grpc_path] = _open(path, purpose, access)
        except OSError as error:
            _log.warning("clients of %s %s: %s", grpc_path, purpose.loss, error)
    return opened


def open_private_socket(purpose: SocketPurpose, access: Access | None) -> SideSocket:
    """Return a socket in a private directory. Raises OSError if that fails."""
    return _open(None, purpose, access)


def _open(path: Path | None, purpose: SocketPurpose, access: Access | None) -> SideSocket:
    if path is not None:
        return SideSocket(path, kind=purpose.kind, access=access)
    path = _private_path(purpose)
    return SideSocket(path, kind=purpose.kind, access=access, has_directory=True)


def _side_path(grpc_path: Path, purpose: SocketPurpose, taken: Sequence[Path]) -> Path | None:
    """Return a path for a side socket in the directory of a gRPC socket; None if every path is too long."""
    digest = hashlib.sha256(os.fsencode(grpc_path.name)).hexdigest()
    names = f"{grpc_path.name}.{purpose.word}", f".{digest[:6]}{purpose.word[0]}"
    free = (path for path in map(grpc_path.with_name, names) if path not in taken)
    return next(filter(is_valid_unix_path, free), None)


def _remove_socket(path: Path) -> None:
    """Remove a socket, if there is one. Raises FileExistsError if the file is not a socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} exists, and is not a socket")
        path.unlink()


def _private_path(purpose: SocketPurpose) -> Path:
    """Return a path in a new private directory. Directories that killed servers have left are removed."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir()
    prefix = f"deconvd-{purpose.word}-"
    root = Path(directory).resolve()
    for left in root.glob(f"{prefix}*/{purpose.word}"):
        _remove_if_dead(left)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root)) / purpose.word


def _remove_if_dead(path: Path) -> None:
    """Remove a socket and its directory if they are this user's and their server has died."""
    with suppress(OSError):  # its server lives and has the lock, or it is gone already
        if path.parent.lstat().st_uid == os.geteuid():
            directory = _lock_directory(path.parent)
            try:
                path.unlink()
                path.parent.rmdir()
            finally:
                os.close(directory)


def _lock_directory(directory: Path) -> int:
    """Lock a private directory for this process, and return its descriptor; closing that ends the lock.

    Only this user can lock it. Raises OSError if another process has locked it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Which process connected, as the kernel saw it at that moment."""

    process: int
    user: int

    def __str__(self) -> str:
        return f"process {self.process} of user {self.user}"


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return which process is at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process, user, _group = _UCRED.unpack(credentials)
    return PeerCredentials(process, user)
