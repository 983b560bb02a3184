"""What the server tells systemd, by the protocol of sd_notify(3): a datagram for each message.

The libraries for it are a binding that needs systemd's headers to build, and one without a release for years.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Mapping
from typing import Final, Protocol

__all__ = ["Notifier", "SystemdNotifier"]

_ABSTRACT_MARK: Final = "@"

_log = logging.getLogger(__name__)


class Notifier(Protocol):
    """Tells whoever watches the server how it is.

    Attributes:
        watchdog_s: How long the server may be silent; infinity if nobody watches.
    """

    watchdog_s: float

    def notify_ready(self) -> None:
        """Tell that the server serves."""

    def notify_stopping(self) -> None:
        """Tell that the server is about to end."""

    def notify_alive(self) -> None:
        """Tell that the server is alive. To be called at least twice in `watchdog_s`."""


class SystemdNotifier:
    """Tells systemd that the server is ready, stops, and is alive. Without systemd it does nothing.

    Attributes:
        watchdog_s: How long the server may be silent; infinity if nobody watches.

    Args:
        environment: The process's environment.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.watchdog_s = math.inf
        self._address = environment.get("NOTIFY_SOCKET", "")
        if not self._address:
            return
        if self._address.startswith(_ABSTRACT_MARK):
            self._address = "\0" + self._address[1:]
        watched_us = environment.get("WATCHDOG_USEC", "")
        is_for_this_process = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if watched_us.isdecimal() and int(watched_us) and is_for_this_process:
            self.watchdog_s = int(watched_us) / 1e6

    def notify_ready(self) -> None:
        """Tell that the server serves."""
        self._send("READY=1")

    def notify_stopping(self) -> None:
        """Tell that the server is about to end."""
        self._send("STOPPING=1")

    def notify_alive(self) -> None:
        """Tell that the server is alive, if that is asked for. To be called at least twice in `watchdog_s`."""
        if self.watchdog_s < math.inf:
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            _log.warning("cannot tell systemd %s: %s", message, error.strerror)
