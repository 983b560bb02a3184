"""The file of a Unix socket: who may open it, and whether anyone listens on it."""

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
    """Another process listens on the address, or its file is not a socket."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may open sockets.

    Attributes:
        mode: The permissions of their files.
        group: The id of their group; None for the one that the system gives them.
    """

    mode: int
    group: int | None = None

    @property
    def is_for_others(self) -> bool:
        """Whether others than the owner may open them."""
        return bool(self.mode & _READ_AND_WRITE_BY_OTHERS)

    def apply_to(self, path: Path) -> None:
        """Let these open a socket, and nobody else.

        Raises:
            OSError: This process may not do so, or the file is no socket any more.
        """
        # by a descriptor: of what someone else may have put there meanwhile nothing is changed
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
                    f"the socket cannot be given to group {self.group}, in which this user is not",
                    str(path),
                ) from None
        file.chmod(self.mode)


def remove_dead_socket(path: Path) -> None:
    """Make room for a socket: remove what a dead server has left.

    Raises:
        AddressInUseError: What is there is no socket, or someone listens on it.
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
    """Return whether anyone listens on a socket, of whatever type. It does not wait for an answer.

    Raises:
        AddressInUseError: It cannot be told, since the socket is for other users.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except PermissionError:
            text = "the socket there is for other users"
            raise AddressInUseError(errno.EACCES, text, str(path)) from None
        except OSError:  # it has no time for us, or is of another type
            return True
        return True
