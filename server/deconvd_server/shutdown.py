"""Runs a daemon until there is a reason to end, then ends the process, whatever clients do, and with no new thread."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

from deconvd_server.device.faults import DeviceHungError, DeviceLostError
from deconvd_server.exit_codes import ExitCode
from deconvd_server.exit_reasons import (
    DrainResult,
    ExitReason,
    ExitReasons,
    ServingLostError,
    StopRequest,
)
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.resources.systemd import Notifier

if TYPE_CHECKING:  # it takes long to import, and signals are to be heeded before
    from deconvd_server.daemon import Daemon

__all__ = ["Drainer", "exit_process", "run"]

_LAST_DRAIN_S: Final = 5.0
"""How long calls may take to end once a device, or a thread that all calls need, is lost."""

_CANCELLED_DRAIN_S: Final = 1.5
"""How long a drain may take to end the calls that it has cancelled: with its other work, that makes two seconds."""

_CUT_DRAIN_S: Final = 0.5
"""How long a drain may take to end the calls that a second signal cancels."""

_LOOK_PERIOD_S: Final = 1.0
"""How often the main thread calls `on_tick` and looks for a device that hangs; more often if a limit is short."""

_BLOCKED_S: Final = 5.0
"""After that time a thread that all calls need, and that has not run, hangs: what it does takes milliseconds."""

_LOST_S: Final = 60.0
"""After that time it is lost, and the process ends. A supervisor, or systemd's watchdog, has killed it long before."""

_RETRY_AFTER_S: Final = 2.0
"""When callers of a device that hangs should try again: a supervisor takes about that long to start the next server."""

_LAST_WORDS_S: Final = 3.0
"""How long `on_end` may take after a clean drain, if the drain leaves that time."""

_SHORT_LAST_WORDS_S: Final = 0.3
"""How long it may take otherwise."""

_ABORT_S: Final = 3.0
"""How long it may take to tell the callers, whatever locks hung threads hold."""

_log = logging.getLogger("deconvd_server")


class Drainer:
    """A thread that ends the work of a daemon. It is started early: later the system may have no thread left.

    Args:
        reasons: Gets a `DrainResult` when the work has ended.
    """

    def __init__(self, reasons: ExitReasons) -> None:
        self._reasons = reasons
        self._end: Callable[[], bool] | None = None
        self._begin_event = threading.Event()
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def begin(self, end: Callable[[], bool]) -> None:
        """Call a function that ends the work, and returns whether no call was cut short."""
        self._end = end
        self._begin_event.set()

    def _run(self) -> None:
        self._begin_event.wait()
        assert self._end is not None
        is_clean = False
        try:
            is_clean = self._end()
        except Exception:  # noqa: BLE001 - logged, and in the exit code
            _log.exception("the drain has failed")
        finally:
            self._reasons.put(DrainResult(is_clean))


def run(
    daemon: Daemon,
    reasons: ExitReasons,
    drainer: Drainer,
    drain_timeout_s: float,
    *,
    device_timeout_s: float,
    drain_delay_s: float = 0.0,
    notifier: Notifier,
    on_tick: Callable[[], None],
    on_end: Callable[[float], None],
) -> NoReturn:
    """Wait for a reason to end, drain, call `on_end`, and end the process.

    The process ends at the next signal, or soon after the time limit, even if calls do not end.

    Args:
        drain_timeout_s: How long calls under way may take to end.
        drain_delay_s: For how long calls are accepted before that. See `Daemon.drain`.
        device_timeout_s: How long a thread may wait for a device. After that the device hangs: a reason to end.
        notifier: Tells systemd, or a supervisor, that the server is alive, and when it stops.
        on_tick: Called about once a second until there is a reason to end.
        on_end: Called last, with the number of seconds that it may take.
    """
    reason = _next_reason(daemon, reasons, device_timeout_s, notifier, on_tick)
    notifier.notify_stopping()
    if isinstance(reason, DeviceHungError):
        _end_hung(daemon, reasons, drainer, reason, on_end)
    is_lost = isinstance(reason, DeviceLostError | ServingLostError)
    if is_lost:
        what = "a device is lost" if isinstance(reason, DeviceLostError) else "a thread is lost"
        _log.error("%s: the server must be restarted: %s", what, reason)
        daemon.fail()
        drain_timeout_s, drain_delay_s = min(drain_timeout_s, _LAST_DRAIN_S), 0.0
    _log.info("%s: draining", getattr(reason, "name", "stop"))
    drainer.begin(partial(daemon.drain, drain_delay_s))
    deadline_s = time.monotonic() + drain_delay_s + drain_timeout_s + _CANCELLED_DRAIN_S
    is_clean = _wait_for_drain(daemon, reasons, deadline_s)
    left_s = max(deadline_s - time.monotonic(), _SHORT_LAST_WORDS_S)
    on_end(min(left_s, _LAST_WORDS_S) if is_clean else _SHORT_LAST_WORDS_S)
    if is_lost:
        exit_process(ExitCode.NEEDS_RESTART)
    exit_process(ExitCode.DRAINED if is_clean else ExitCode.CUT_SHORT)


def _next_reason(
    daemon: Daemon,
    reasons: ExitReasons,
    device_timeout_s: float,
    notifier: Notifier,
    on_tick: Callable[[], None],
) -> ExitReason | DeviceHungError:
    """Wait for a reason to end, and look meanwhile whether a device or a thread hangs."""
    period_s = min(_LOOK_PERIOD_S, device_timeout_s / 4, notifier.watchdog_s / 3)
    notifier.notify_alive()
    blocked: str | None = None
    while (reason := reasons.take(period_s)) is None:
        on_tick()
        was_blocked, blocked = blocked, daemon.blocked_loop(_BLOCKED_S)
        if blocked is None or blocked != was_blocked:  # or the process was stopped as a whole
            notifier.notify_alive()
        else:  # a thread that hangs cannot be ended: whoever watches ends the process, or at last this one does
            if daemon.blocked_loop(_LOST_S) is not None:
                return ServingLostError(f"{blocked} has not run for {_LOST_S:g} s")
            key = {REPEAT_KEY: (__name__, blocked)}
            _log.error("%s has not run for %g s", blocked, _BLOCKED_S, extra=key)
        if (device := daemon.hung_device(device_timeout_s)) is not None:
            return DeviceHungError(
                f"{device} has not ended a kernel or copy for {device_timeout_s:g} s "
                "(--device-timeout-s): the server is restarting",
                retry_after_s=_RETRY_AFTER_S,
            )
    return reason


def _end_hung(
    daemon: Daemon,
    reasons: ExitReasons,
    drainer: Drainer,
    error: DeviceHungError,
    on_end: Callable[[float], None],
) -> NoReturn:
    """Tell all callers, and end the process. The threads that hang may hold locks: nothing here waits for long."""
    _log.error("a device hangs: the server must be restarted: %s", error)
    drainer.begin(lambda: daemon.abort(error))
    _wait_for_drain(daemon, reasons, time.monotonic() + _ABORT_S)
    on_end(_SHORT_LAST_WORDS_S)
    exit_process(ExitCode.DEVICE_HUNG)


def _wait_for_drain(daemon: Daemon, reasons: ExitReasons, deadline_s: float) -> bool:
    """Wait until the daemon has drained, or the deadline; return whether it has, and no call was cut short."""
    while (reason := reasons.take(deadline_s - time.monotonic())) is not None:
        if isinstance(reason, DrainResult):
            return reason.is_clean
        # another signal, or what a supervisor makes of it
        if reason is not StopRequest.DRAIN and not isinstance(
            reason, DeviceLostError | ServingLostError
        ):
            daemon.cut_drain()
            deadline_s = min(deadline_s, time.monotonic() + _CUT_DRAIN_S)
    _log.error("calls that were cancelled do not end: the process ends without them")
    return False


def exit_process(code: ExitCode) -> NoReturn:
    """End the process at once. An ordinary exit could hang in the libraries of a lost card, or wait for threads."""
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
