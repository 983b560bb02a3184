"""Runs a daemon until there is a reason to end, then ends the process, whatever clients do, and with no new thread."""

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
"""How long calls may take to end once a device, or a thread that all calls need, is lost."""

_CANCELLED_DRAIN_S: Final = 1.5
"""How long a drain may take to end the calls that it has cancelled: with its other work, that makes two seconds."""

_CUT_DRAIN_S: Final = 0.5
"""How long a drain may take to end the calls that a second signal cancels."""

_log = logging.getLogger("deconvd_server")


class Drainer:
    """A thread that drains a daemon. It is started early: later the system may have no thread left.

    Args:
        reasons: Gets a `DrainResult` when the daemon has drained.
    """

    def __init__(self, reasons: ExitReasons) -> None:
        self._reasons = reasons
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
        is_clean = False
        try:
            is_clean = self._daemon.drain()
        except Exception:  # noqa: BLE001 - logged, and in the exit code
            _log.exception("the drain has failed")
        finally:
            self._reasons.put(DrainResult(is_clean))


def run(daemon: Daemon, reasons: ExitReasons, drainer: Drainer, drain_timeout_s: float) -> NoReturn:
    """Wait for a reason to end, drain, and end the process.

    The process ends at the next signal, or soon after the time limit, even if calls do not end.
    """
    reason = reasons.take()
    is_lost = isinstance(reason, DeviceLostError | ServingLostError)
    if is_lost:
        what = "a device is lost" if isinstance(reason, DeviceLostError) else "a thread is lost"
        _log.error("%s: the server must be restarted: %s", what, reason)
        daemon.fail()
        drain_timeout_s = min(drain_timeout_s, _LAST_DRAIN_S)
    _log.info("%s: draining", getattr(reason, "name", "stop"))
    drainer.begin(daemon)
    is_clean = _wait_for_drain(
        daemon, reasons, time.monotonic() + drain_timeout_s + _CANCELLED_DRAIN_S
    )
    if is_lost:
        _exit_process(ExitCode.NEEDS_RESTART)
    _exit_process(ExitCode.DRAINED if is_clean else ExitCode.CUT_SHORT)


def _wait_for_drain(daemon: Daemon, reasons: ExitReasons, deadline_s: float) -> bool:
    """Wait until the daemon has drained, or the deadline; return whether it has, and no call was cut short."""
    while (reason := reasons.take(deadline_s - time.monotonic())) is not None:
        if isinstance(reason, DrainResult):
            return reason.is_clean
        if not isinstance(reason, DeviceLostError | ServingLostError):  # another signal
            daemon.cut_drain()
            deadline_s = min(deadline_s, time.monotonic() + _CUT_DRAIN_S)
    _log.error("calls that were cancelled do not end: the process ends without them")
    return False


def _exit_process(code: ExitCode) -> NoReturn:
    """End the process at once. An ordinary exit could hang in the libraries of a lost card, or wait for threads."""
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
