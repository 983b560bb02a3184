"""Where memory is lent: the path of the socket."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from deconvd.shared_memory import socket_beside
from deconvd.transport import unix_path

__all__ = ["is_private", "memory_socket"]

_MAX_PATH_BYTES: Final = 107  # sun_path of sockaddr_un(7), less the final zero
_PROBE_TIMEOUT_S: Final = 1.0


_PRIVATE: Final = "deconvd-memory-"
"""How the names of private directories begin."""

_NAME: Final = "memory"


def memory_socket(addresses: Iterable[str]) -> Path:
    """Return where a server that listens on `addresses` should have its side socket.

    It is beside the first Unix socket that leaves room for it; else in a new directory of its own,
    which goes with it. What servers that were killed left of theirs is
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


def is_private(path: Path) -> bool:
    """Return whether `memory_socket` has made the path's directory for it alone."""
    return path.parent.name.startswith(_PRIVATE)


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
