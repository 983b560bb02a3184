"""Ends a server with the process that started it, however that process ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from deconvd.wire.grpc_options import unix_path

__all__ = ["ParentWatch", "start_parent_watch"]

_POLL_S: Final = 0.5

_log = logging.getLogger(__name__)


class ParentWatch:
    """Sends this process SIGTERM once another process is not its parent any more.

    The kernel gives the children of a dead process another parent. So this process asks for its parent again and again.
    PR_SET_PDEATHSIG would end the server with the thread that started it, and a pipe would stay open in children that
    the parent has forked.

    Args:
        parent: The id of the process.
        directories: Directories that the parent would remove. If it dies, `clean_up` removes those that are empty.
    """

    def __init__(self, parent: int, directories: Iterable[Path]) -> None:
        self._parent = parent
        self._directories = list(directories)
        self._has_lost_parent = False

    def start(self) -> None:
        """Watch from now on, in a thread. If the parent has died already, the signal comes at once."""
        threading.Thread(target=self._run, name="parent", daemon=True).start()

    def clean_up(self) -> None:
        """Remove the directories, if the parent has died. Call it once no socket is left in them."""
        if self._has_lost_parent:
            for directory in self._directories:
                with suppress(OSError):  # it is not empty, or gone
                    directory.rmdir()

    def _run(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(_POLL_S)
        self._has_lost_parent = True
        _log.info("process %d, which started the server, has ended", self._parent)
        os.kill(os.getpid(), signal.SIGTERM)


def start_parent_watch(parent: int | None, addresses: Iterable[str]) -> ParentWatch | None:
    """Watch a server's parent, if it is given, and return the watch.

    Args:
        addresses: Where the server listens. The directories of its Unix sockets are the parent's.
    """
    if parent is None:
        return None
    paths = map(unix_path, addresses)
    watch = ParentWatch(parent, [Path(path).parent.resolve() for path in paths if path])
    watch.start()
    return watch
