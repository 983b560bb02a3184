"""The file of a Unix socket: who may open it, and whether a server listens on it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Access", "AddressInUseError", "remove_dead_socket"]

_READ_AND_WRITE_BY_OTHERS: Final = 0o066


class AddressInUseError(OSError):
    """Another process listens on the address, or the file there is not a socket."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may open the files of sockets.

    Attributes:
        mode: Permissions of the files.
        group: Id of their group; None for the group that the system chooses.
    """

    mode: int
    group: int | None = None

    @property
    def is_for_others(self) -> bool:
        """Whether users other than the owner may open them."""
        return bool(self.mode & _READ_AND_WRITE_BY_OTHERS)

    def apply_to(self, path: Path) -> None:
        """Set the permissions and the group of a socket's file.

        Raises:
            OSError: This process may not do so, or the file is not a socket any more.
        """
        # By a descriptor: if another user has put another file there meanwhile, that one must not be changed.
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                raise FileExistsError(errno.EEXIST, "the socket was replaced", str(path))
            self._set_owner_and_mode(Path(f"/proc/self/fd/{descriptor}"), path)
        finally:
            os.close(descriptor)

    def _set_owner_and_mode(self, file: Path, path: Path) -> None:
        if self.group is not None:
            try:
                os.chown(file, -1, self.group)
            except PermissionError as error:
                raise PermissionError(
                    error.errno,
                    f"the socket cannot be given to group {self.group}: this user is not a member of it",
                    str(path),
                ) from None
        file.chmod(self.mode)


def remove_dead_socket(path: Path) -> None:
    """Remove the socket that a dead server has left, if there is one.

    Raises:
        AddressInUseError: The file is not a socket, or a server listens on it.
        OSError: It cannot be removed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise AddressInUseError(
                errno.EADDRINUSE, "the file is not a socket", str(path)
            ) from None
        return
    if not stat.S_ISSOCK(mode):
        raise AddressInUseError(errno.EADDRINUSE, "the file is not a socket", str(path))
    if _is_listening(path):
        raise AddressInUseError(errno.EADDRINUSE, "a live server listens there", str(path))
    path.unlink()


def _is_listening(path: Path) -> bool:
    """Return whether a server listens on a socket of any type. This does not wait for the server.

    Raises:
        AddressInUseError: That cannot be found out, since the socket is for other users.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except PermissionError:
            text = "this user may not open the socket there, so it may be in use"
            raise AddressInUseError(errno.EACCES, text, str(path)) from None
        except OSError:  # its backlog is full, or it is of another type: a server is there
            return True
        return True
