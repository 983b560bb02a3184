"""A Unix socket path that several workers share: a second name, a hard link, of the socket of one of them.

A symbolic link would not do. In a directory that everyone may write to, as /tmp, the kernel lets nobody else than its
owner follow one (fs.protected_symlinks).
"""

from __future__ import annotations

import logging
import os
from typing import Final

from deconvd_server.resources.socket_file import remove_dead_socket
from deconvd_server.resources.socket_lock import lock_path
from deconvd_server.transports.listen import unix_path_to_bind

__all__ = ["SharedPath"]

_NEXT: Final = "next"

_log = logging.getLogger(__name__)


class SharedPath:
    """The path of a Unix socket at which one worker answers at a time.

    Args:
        address: ``unix:path``, as for `bind`. A socket that a dead server has left there is removed.

    Raises:
        InvalidArgumentError: The address has another form, or its directory does not exist.
        AddressInUseError: A live server listens there, or the file is not a socket.
        OSError: The file cannot be removed.
    """

    def __init__(self, address: str) -> None:
        self._path = unix_path_to_bind(address)
        self._inode: int | None = None
        with lock_path(self._path):
            remove_dead_socket(self._path)

    def lead_to(self, own_path: str) -> None:
        """Have the path lead to a worker's own socket from now on. It does so already if nobody has removed it."""
        following = self._path.with_name(f".{self._path.name}.{_NEXT}")
        try:
            inode = os.stat(own_path).st_ino
            if inode == self._inode and self._is_there():
                return
            with lock_path(self._path):
                following.unlink(missing_ok=True)
                os.link(own_path, following)
                os.replace(following, self._path)  # at once: a client finds the one or the other
            self._inode = inode
        except OSError as error:
            _log.warning("%s cannot lead to %s: %s", self._path, own_path, error)

    def remove(self) -> None:
        """Remove the path, unless another server has it by now."""
        try:
            with lock_path(self._path):
                if self._is_there():
                    self._path.unlink()
        except OSError as error:
            _log.warning("the file of a Unix socket cannot be removed: %s", error)

    def _is_there(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False
