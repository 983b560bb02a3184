"""Runs a daemon until there is a reason to end, then ends the process: whatever clients do, without a new thread."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Final, NoReturn

from deconvd_server.daemon import Daemon
from deconvd_server.device.faults import DeviceLostError
from deconvd_server.exit_codes import ExitCode
from deconvd_server.exit_reasons import DrainResult, ExitReasons, ServingLostError

__all__ = ["Drainer", "run"]

_LAST_DRAIN_S: Final = 5.0
"""How long the calls of other devices may take to end once one device, or a thread that serves, is lost."""

_CANCELLED_DRAIN_S: Final = 1.5
"""How long a drain may take to end calls that it has cancelled: with the rest of its work, two seconds."""

_CUT_DRAIN_S: Final = 0.5
"""The same, after a second signal."""

_log = logging.getLogger("deconvd_server")


class Drainer:
    """A thread that drains a daemon once it is told to. It is started early: later the system may have none left.

    Args:
        ends: Is told when the daemon has drained.
    """

    def __init__(self, ends: ExitReasons) -> None:
        self._ends = ends
        self._daemon: Daemon | None = None
        self._begin_event = threading.Event()
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def begin(self, daemon: Daemon) -> None:
        """Drain a daemon."""
        self._daemon = daemon
        self._begin_event.set()

    def _run(self) -> None:
        self._begin_event.wait()
        assert self._daemon is not None
        is_whole = False
        try:
            is_whole = self._daemon.drain()
        except Exception:  # noqa: BLE001 - logged, and in the exit code
            _log.exception("the drain has failed")
        finally:
            self._ends.put(DrainResult(is_whole))


def run(daemon: Daemon, ends: ExitReasons, drainer: Drainer, drain_timeout_s: float) -> NoReturn:
    """Wait for a reason to end, drain, and end the process.

    It ends at the next signal, or soon after the time limit, even if calls do not.
    """
    end = ends.take()
    is_lost = isinstance(end, DeviceLostError | ServingLostError)
    if is_lost:
        what = "a device is lost" if isinstance(end, DeviceLostError) else "a thread is lost"
        _log.error("%s: the server must be started anew: %s", what, end)
        daemon.fail()
        drain_timeout_s = min(drain_timeout_s, _LAST_DRAIN_S)
    _log.info("%s: draining", getattr(end, "name", "stop"))
    drainer.begin(daemon)
    is_whole = _wait_for_drain(
        daemon, ends, time.monotonic() + drain_timeout_s + _CANCELLED_DRAIN_S
    )
    if is_lost:
        _exit_process(ExitCode.START_ANEW)
    _exit_process(ExitCode.DRAINED if is_whole else ExitCode.CUT_SHORT)


def _wait_for_drain(daemon: Daemon, ends: ExitReasons, deadline_s: float) -> bool:
    """Wait until the daemon has drained, but not for longer; return whether no call was cut short."""
    while (end := ends.take(deadline_s - time.monotonic())) is not None:
        if isinstance(end, DrainResult):
            return end.is_clean
        if not isinstance(end, DeviceLostError | ServingLostError):  # another signal
            daemon.cut_drain()
            deadline_s = min(deadline_s, time.monotonic() + _CUT_DRAIN_S)
    _log.error("calls that were cancelled do not end: the process ends without them")
    return False


def _exit_process(code: ExitCode) -> NoReturn:
    """End the process at once: a lost card's libraries may hang at exit, and so may threads at work."""
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
