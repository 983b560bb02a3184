"""The supervisor: it starts workers, starts them again when they end, tells each of the others, and ends with them.

It is one thread that waits for signals and for what workers say, besides the threads of the health and metrics ports.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable, Sequence
from typing import Final

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.device.faults import DeviceLostError
from deconvd_server.exit_codes import ExitCode
from deconvd_server.exit_reasons import ExitReasons, ServingLostError
from deconvd_server.resources.shared_quotas import SharedQuotas
from deconvd_server.resources.systemd import SystemdNotifier
from deconvd_server.supervision.home_claims import HomeClaims
from deconvd_server.supervision.link import Packet
from deconvd_server.supervision.shared_path import SharedPath
from deconvd_server.supervision.worker import ENDS_OF_DRAIN, Worker
from deconvd_server.transports.grpc.health import Health

__all__ = ["Supervisor"]

_TICK_S: Final = 1.0
"""How often it looks for silent workers and removed paths, and tells systemd that it is alive."""

_LATE_S: Final = 1.0
"""If it looks so much later than that, it was itself stopped."""

_REAP_S: Final = 0.02
"""How often it looks for the end of a process whose link has ended."""

_LAST_DRAIN_S: Final = 2.0
"""How much longer than their calls workers may take to end."""

_CUT_S: Final = 1.5
"""How long they may take after a second signal."""

_KILLED_S: Final = 1.0
"""How long killed processes may take to end."""

_COULD_NOT_START: Final = frozenset({ExitCode.FAILED, ExitCode.WRONG_OPTION})

_log = logging.getLogger("deconvd_server")


class Supervisor:
    """Runs workers until a signal, or until it is clear that none can start.

    Args:
        workers: The workers.
        paths: The shared Unix paths, in the order of each worker's own ones.
        quotas: What tenants use in each worker; None if they have no quotas.
        health: SERVING while at least one worker serves.
        reasons: Has the signals.
        notifier: Told of the same as for a server alone.
        on_ready: Called when the first worker serves.
        on_tick: Called about once a second.
        drain_s: How long calls may take after the first signal, the time in which they are still accepted included.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        paths: Sequence[SharedPath],
        quotas: SharedQuotas | None,
        health: Health,
        reasons: ExitReasons,
        notifier: SystemdNotifier,
        *,
        on_ready: Callable[[], None],
        on_tick: Callable[[], None],
        drain_s: float,
    ) -> None:
        self._workers = workers
        self._paths = paths
        self._quotas = quotas
        self._health = health
        self._reasons = reasons
        self._notifier = notifier
        self._on_ready = on_ready
        self._on_tick = on_tick
        self._drain_s = drain_s
        self._is_ready = False
        self._serving: list[bool] = []
        self._leader: Worker | None = None
        self._next_tick_s = time.monotonic()
        self._is_draining = False
        self._claims = HomeClaims()

    def run(self) -> ExitCode:
        """Run the workers, and return what to end with. All their processes have ended then."""
        while True:
            for worker in self._workers:
                worker.start_if_due()
            reason = self._step()
            if reason is not None:
                return self._drain(reason)
            if (code := self._why_none_can_start()) is not None:
                self._drain("no process can start")
                return code

    def kill_all(self) -> None:
        """End all processes at once. For an error of the supervisor itself."""
        for worker in self._workers:
            worker.kill()

    def _step(self) -> str | None:
        """Wait for news for a while, and take them. Return why to end, if there is a reason."""
        reason = self._wait()
        has_changed = False
        for worker in self._workers:
            has_changed |= worker.take_packets()
            self._claims.note_load(worker.place.name, worker.load)
            if worker.reap(is_draining=self._is_draining):
                self._claims.forget(worker.place.name)
                if self._quotas is not None:
                    self._quotas.clear(int(worker.place.name))
                has_changed = True
        self._give_homes()
        self._pass_room_requests_on()
        if time.monotonic() >= self._next_tick_s:
            self._tick()
        # a worker that says nothing any more changes as well
        serving = [worker.is_serving for worker in self._workers]
        if has_changed or serving != self._serving:
            self._serving = serving
            self._spread_news()
        return reason

    def _give_homes(self) -> None:
        """Answer the workers that ask where clients that begin should keep to."""
        serving = {w.place.name: w.place.device for w in self._workers if w.is_serving}
        for worker in self._workers:
            worker.answer_home_requests(lambda: self._claims.claim(serving, time.monotonic()))

    def _pass_room_requests_on(self) -> None:
        for worker in self._workers:
            for request in worker.room_requests:
                self._workers[request[0]].pass_on(request[1:])
            worker.room_requests.clear()

    def _wait(self) -> str | None:
        with selectors.PollSelector() as selector:  # which needs no descriptor: none may be left
            selector.register(self._reasons, selectors.EVENT_READ)
            for worker in self._workers:
                if worker.link is not None:
                    selector.register(worker.link, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(self._wait_s())]
        if self._reasons not in ready or (reason := self._reasons.take(0)) is None:
            return None
        if isinstance(reason, DeviceLostError | ServingLostError):
            return str(reason)
        return str(getattr(reason, "name", reason))

    def _wait_s(self) -> float:
        is_ending = any(worker.has_process and worker.link is None for worker in self._workers)
        if is_ending:
            return _REAP_S
        due_s = min([self._next_tick_s, *(worker.start_due_s for worker in self._workers)])
        return max(due_s - time.monotonic(), 0)

    def _tick(self) -> None:
        late_s = time.monotonic() - self._next_tick_s
        if late_s > _LATE_S:  # all processes were stopped, as in a container that was paused
            for worker in self._workers:
                worker.excuse(late_s)
        self._next_tick_s = time.monotonic() + min(_TICK_S, self._notifier.watchdog_s / 3)
        if self._is_ready and not self._is_draining:
            self._notifier.notify_alive()
        self._on_tick()
        for worker in self._workers:
            worker.kill_if_silent()
        self._lead_paths()  # again: someone may have removed them
        if any(worker.owes_table for worker in self._workers):
            self._tell_table()

    def _spread_news(self) -> None:
        """Tell everyone who serves."""
        self._lead_paths()  # first: who hears of it may connect
        self._tell_table()
        self._health.set_serving(any(self._serving) and not self._is_draining)
        if any(self._serving) and not self._is_ready:
            self._is_ready = True
            self._notifier.notify_ready()
            self._on_ready()

    def _tell_table(self) -> None:
        table = pb.GetServerInfoResponse(workers=[worker.message() for worker in self._workers])
        for worker in self._workers:
            worker.tell_table(table.SerializeToString())

    def _lead_paths(self) -> None:
        """Have the shared paths lead to a worker that serves, and to the same one until it serves no more."""
        if self._leader is None or not self._leader.is_serving:
            self._leader = next((worker for worker in self._workers if worker.is_serving), None)
        if self._leader is not None:
            for path, own_path in zip(self._paths, self._leader.own_paths, strict=True):
                path.lead_to(own_path)

    def _why_none_can_start(self) -> ExitCode | None:
        """Return the exit code if no process has ever served, and each worker has said that it cannot start."""
        if any(w.has_served or w.exit_code not in _COULD_NOT_START for w in self._workers):
            return None
        return ExitCode(max(worker.exit_code or 0 for worker in self._workers))

    def _drain(self, reason: str) -> ExitCode:
        """Have all workers end, and return what to end with."""
        _log.info("%s: draining", reason)
        self._is_draining = True
        self._notifier.notify_stopping()
        self._health.fail()
        self._tell(Packet.DRAIN)
        deadline_s = time.monotonic() + self._drain_s + _LAST_DRAIN_S
        is_killed = False
        while any(worker.has_process for worker in self._workers):
            if self._step() is not None:
                self._tell(Packet.CUT)
                deadline_s = min(deadline_s, time.monotonic() + _CUT_S)
            if time.monotonic() > deadline_s:
                if is_killed:  # the kernel does not end a process that waits for a device
                    _log.error(
                        "processes that were killed do not end: the supervisor ends without them"
                    )
                    break
                _log.error("processes do not end, and are killed")
                self.kill_all()
                is_killed, deadline_s = True, time.monotonic() + _KILLED_S
        return self._worst_end()

    def _tell(self, letter: Packet) -> None:
        for worker in self._workers:
            worker.tell(letter)

    def _worst_end(self) -> ExitCode:
        return max((worker.end_of_drain for worker in self._workers), key=ENDS_OF_DRAIN.index)
