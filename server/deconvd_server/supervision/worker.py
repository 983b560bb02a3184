"""A worker, as its supervisor sees it: its process, its link, and what is known of it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from typing import Any, Final

from deconvd.host.machine import PARTS_VARIABLE
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.exit_codes import ExitCode
from deconvd_server.resources.worker_table import ConnectionLoad
from deconvd_server.supervision.layout import WorkerPlace
from deconvd_server.supervision.link import MAX_PACKET_BYTES, Packet, parse_load
from deconvd_server.supervision.metrics_channel import MetricsChannel
from deconvd_server.supervision.orders import WorkerOrders
from deconvd_server.supervision.plans_folder import PlansFolder

__all__ = ["ENDS_OF_DRAIN", "Worker", "WorkerState"]

_FIRST_PAUSE_S: Final = 0.2
"""How soon the first process after one that has ended is started; the pause doubles with each that ends soon."""

_LONGEST_PAUSE_S: Final = 30.0

_LASTING_S: Final = 60.0
"""How long a process must have lasted for the next pause to be the first one again."""

_SILENT_S: Final = 10.0
"""After that time without a sign of life a worker is not called any more. It says that it is alive once a second."""

ENDS_OF_DRAIN: Final = (
    ExitCode.DRAINED,
    ExitCode.CUT_SHORT,
    ExitCode.NEEDS_RESTART,
    ExitCode.DEVICE_HUNG,
)
"""What a drain may come to, the worst last."""

_log = logging.getLogger("deconvd_server")


class WorkerState(Enum):
    """Where a worker is in its life.

    STARTING --ready--> SERVING --it stops, or is told to--> STOPPING
        `------------------|-------its process ends-----------'----> WAITING --pause over--> STARTING
    any of them --its process ends in a drain--> ENDED
    """

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    WAITING = "waiting"
    ENDED = "ended"


class Worker:
    """A worker. Its process is replaced when it ends, and it keeps its name and addresses.

    Attributes:
        place: Its place among the others.
        state: Where it is in its life.
        metrics: How it is asked for metrics; None if nobody asks, or there is no process.
        link: Its link, to wait for; None if there is no process.
        exit_code: What the last process has ended with, as `subprocess` counts; None before.
        restarts_count: How many processes it has had after the first.
        has_served: Whether one of them has served.
        load: What its direct connections are, as it has told last.
        room_requests: Its requests for room in tenants' quotas, which the others have not been told yet.
        home_requests: The numbers of its requests for clients' homes that were not answered yet.

    Args:
        grpc_port: Its own port, or 0.
        options: Its own values for options of the command.
        plans: The folder of plans that ends with the supervisor; None if there is another one, or none.
        quotas: The descriptor of the memory in which all workers count what tenants use; None if there is none.
        has_metrics: Whether it will be asked for metrics.
        watchdog_s: How long it may be silent before it is killed.
        drain_s: How much longer it may take to end once it has said that it is about to.
        workers_count: How many share the machine.
    """

    def __init__(
        self,
        place: WorkerPlace,
        grpc_port: int,
        options: Mapping[str, Any],
        plans: PlansFolder | None,
        quotas: int | None,
        *,
        has_metrics: bool,
        watchdog_s: float,
        drain_s: float,
        workers_count: int,
    ) -> None:
        self.place = place
        self.state = WorkerState.WAITING
        self.metrics: MetricsChannel | None = None
        self.link: socket.socket | None = None
        self.exit_code: int | None = None
        self.restarts_count = -1
        self.has_served = False
        self.load = ConnectionLoad(0, 0)
        self.home_requests: list[bytes] = []
        self.room_requests: list[bytes] = []
        self._message = pb.Worker(name=place.name, grpc_port=grpc_port, devices=[place.device])
        self._options = options
        self._plans = plans
        self._quotas = quotas
        self._has_metrics = has_metrics
        self._watchdog_s = watchdog_s
        self._drain_s = drain_s
        self._workers_count = workers_count
        self._process: subprocess.Popen[bytes] | None = None
        self._failures_count = 0
        self._start_due_s = 0.0
        self._started_s = 0.0
        self._alive_s = 0.0
        self._owes_table = False
        self._has_process_served = False
        self._drained_code: int | None = None

    def __str__(self) -> str:
        return f"worker {self.place.name} ({self.place.device})"

    @property
    def is_serving(self) -> bool:
        """Whether calls should be sent to it."""
        return self.state is WorkerState.SERVING and time.monotonic() - self._alive_s < _SILENT_S

    @property
    def has_process(self) -> bool:
        """Whether it has a process that has not ended."""
        return self._process is not None

    @property
    def start_due_s(self) -> float:
        """When its next process is to be started, by the monotonic clock; infinity if it has one, or needs none."""
        return self._start_due_s if self.state is WorkerState.WAITING else math.inf

    @property
    def own_paths(self) -> Sequence[str]:
        """The paths of its own Unix sockets; empty before it has served."""
        return self._message.unix_sockets

    def message(self) -> pb.Worker:
        """Return its entry in the table."""
        message = pb.Worker(is_serving=self.is_serving)
        message.MergeFrom(self._message)
        return message

    @property
    def end_of_drain(self) -> ExitCode:
        """What a drain has come to here: DRAINED if there was no process, or it had not served yet."""
        if self.has_process:
            return ExitCode.CUT_SHORT
        if self._drained_code is None:
            return ExitCode.DRAINED
        if self._drained_code in ENDS_OF_DRAIN:
            return ExitCode(self._drained_code)
        return ExitCode.CUT_SHORT  # a signal, or an error of its own

    def start_if_due(self) -> bool:
        """Start a process if there is none, and the pause is over. Return whether one was started."""
        if self.state is not WorkerState.WAITING or time.monotonic() < self._start_due_s:
            return False
        self._start()
        return True

    def _start(self) -> None:
        with ExitStack() as its_ends, ExitStack() as own_ends:
            try:
                link, link_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                own_ends.enter_context(link)
                its_ends.enter_context(link_end)
                metrics = metrics_end = None
                if self._has_metrics:
                    metrics, metrics_end = socket.socketpair()
                    own_ends.enter_context(metrics)
                    its_ends.enter_context(metrics_end)
                self._process = self._start_process(link_end, metrics_end)
            except OSError as error:  # there is too little of something, which may pass
                _log.error("%s cannot be started: %s", self, error)
                self._wait_for_next()
                return
            own_ends.pop_all()
        link.setblocking(False)
        self.link = link
        self.metrics = None if metrics is None else MetricsChannel(metrics)
        self.state = WorkerState.STARTING
        self.restarts_count += 1
        self._has_process_served = False
        self._alive_s = self._started_s = time.monotonic()
        _log.info("%s: process %d starts", self, self._process.pid)

    def _start_process(
        self, link_end: socket.socket, metrics_end: socket.socket | None
    ) -> subprocess.Popen[bytes]:
        """Start a process, which has its ends of the link and of the channel for metrics."""
        orders = WorkerOrders(
            name=self.place.name,
            link=link_end.fileno(),
            metrics=None if metrics_end is None else metrics_end.fileno(),
            quotas=self._quotas,
            card_parts_count=self.place.sharers_count,
            is_plan_store_lasting=self._plans is None,
            watchdog_s=self._watchdog_s,
            options=self._options,
        )
        inherited = [end.fileno() for end in (link_end, metrics_end) if end is not None]
        if self._plans is not None:
            inherited.append(self._plans.descriptor)
        if self._quotas is not None:
            inherited.append(self._quotas)
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, *sys.orig_argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the supervisor alone prints where to call
            env={
                **os.environ,
                PARTS_VARIABLE: str(self._workers_count),
                **orders.to_environment(),
            },
            pass_fds=inherited,
            process_group=0,  # Ctrl-C is for the supervisor
        )

    def take_packets(self) -> bool:
        """Read what it says. Return whether its entry in the table has changed."""
        has_changed = False
        while self.link is not None:
            try:
                packet = self.link.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                packet = b""
            if not packet:
                self._close_link()  # its process ends, or has ended
                return True
            has_changed |= self._take(Packet(packet[:1]), packet[1:])
        return has_changed

    def _take(self, letter: Packet, contents: bytes) -> bool:
        was_serving, was_active_count = self.is_serving, self._message.active_connections_count
        if letter not in (
            Packet.LOAD,
            Packet.HOME,
            Packet.ROOM,
        ):  # which other threads send than those that may hang
            self._alive_s = time.monotonic()
        if letter in (Packet.READY, Packet.ALIVE):
            described = pb.Worker.FromString(contents)
            self._message.active_connections_count = described.active_connections_count
        if letter is Packet.READY:
            for field in ("unix_sockets", "devices"):
                self._message.ClearField(field)
            self._message.MergeFrom(described)
            if self.state is WorkerState.STARTING:
                self.state, self.has_served = WorkerState.SERVING, True
            self._has_process_served = True
        elif letter is Packet.LOAD:
            self.load = parse_load(contents)
        elif letter is Packet.HOME:
            self.home_requests.append(contents)
        elif letter is Packet.ROOM:
            self.room_requests.append(contents)
        elif letter is Packet.STOPPING:
            self.state = WorkerState.STOPPING
        has_changed = self._message.active_connections_count != was_active_count
        return has_changed or self.is_serving != was_serving or letter is Packet.READY

    def tell(self, letter: Packet) -> None:
        """Tell it what to do, if it has a process."""
        if letter is Packet.DRAIN and self.state is WorkerState.WAITING:
            self.state = WorkerState.ENDED
        self._send(letter.value)

    def answer_home_requests(self, choose: Callable[[], str]) -> None:
        """Answer each of its requests for a client's home."""
        for number in self.home_requests:
            self._send(Packet.HOME.value + number + choose().encode())
        self.home_requests.clear()

    def pass_on(self, room_request: bytes) -> None:
        """Tell it that another worker needs room in a tenant's quota."""
        self._send(Packet.ROOM.value + room_request)

    def tell_table(self, table: bytes) -> None:
        """Tell it of all workers. If it does not read now, `owes_table` is true afterwards."""
        self._owes_table = not self._send(Packet.TABLE.value + table)

    @property
    def owes_table(self) -> bool:
        """Whether it has not been told the last table."""
        return self._owes_table and self.link is not None

    def _send(self, packet: bytes) -> bool:
        try:
            if self.link is not None:
                self.link.send(packet, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:  # it ends, as its link will say
            return True
        return True

    def kill_if_silent(self) -> None:
        """Kill its process if its main thread has been silent for too long: it hangs, and would for ever."""
        limits_s = {
            WorkerState.SERVING: self._watchdog_s,
            WorkerState.STOPPING: self._watchdog_s + self._drain_s,
        }
        limit_s = limits_s.get(self.state, math.inf)
        if self.has_process and time.monotonic() - self._alive_s > limit_s:
            _log.error("%s has been silent for %g s, and is killed", self, limit_s)
            self.kill()

    def excuse(self, pause_s: float) -> None:
        """Count a time not as its silence in which nobody could have heard it."""
        self._alive_s = min(self._alive_s + pause_s, time.monotonic())

    def kill(self) -> None:
        """End its process at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def reap(self, *, is_draining: bool) -> bool:
        """Note the end of its process, if it has ended. Return whether it has.

        Args:
            is_draining: Whether it is not to be started again.
        """
        if self._process is None or (code := self._process.poll()) is None:
            return False
        self.exit_code, self._process = code, None
        self._message.instance_id = ""  # all that it had has gone with it
        self._close_link()
        self.load = ConnectionLoad(0, 0)
        self.home_requests.clear()
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None
        if is_draining:
            self.state = WorkerState.ENDED
            if self._has_process_served:  # else it had nothing to lose, whatever has ended it
                self._drained_code = code
            _log.info("%s %s", self, _describe_end(code))
        else:
            self._wait_for_next()
            pause_s = self._start_due_s - time.monotonic()
            level = logging.INFO if code == ExitCode.DRAINED else logging.ERROR
            _log.log(
                level, "%s %s; the next one starts in %.1f s", self, _describe_end(code), pause_s
            )
        return True

    def _wait_for_next(self) -> None:
        if time.monotonic() - self._started_s > _LASTING_S:
            self._failures_count = 0
        pause_s = min(_FIRST_PAUSE_S * 2**self._failures_count, _LONGEST_PAUSE_S)
        self._failures_count += 1
        self._start_due_s = time.monotonic() + pause_s
        self.state = WorkerState.WAITING

    def _close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
        if self.state in (WorkerState.STARTING, WorkerState.SERVING):
            self.state = WorkerState.STOPPING


def _describe_end(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was ended by {name}"
    try:
        return f"has ended with exit code {code} ({ExitCode(code).name.lower()})"
    except ValueError:
        return f"has ended with exit code {code}"
