"""The server of a soak: one process after the other, started anew when it is killed or drained, and watched."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from deconvd.host.machine import memory_bytes
from deconvd_server.resources.budgets import PROCESS_BYTES, Budgets
from tests.cgroups import Cgroup
from tests.processes import peak_memory_bytes, process_resources
from tests.servers import ServerProcess, server_process
from tests.soak.places import Interval, Places

__all__ = ["GROUP_BYTES", "Drain", "Record", "Supervisor"]

_MIB = 1 << 20

_DEVICE_BYTES, _SHARED_BYTES, _MESSAGE_BYTES = 192 * _MIB, 384 * _MIB, 64 * _MIB
_DRAIN_TIMEOUT_S = 4.0

GROUP_BYTES = 1280 * _MIB
"""What the kernel lets the server have."""

_LATE_S = 5.0
"""How long after the drain's timeout, or a second signal, the process may end."""

_CUT_AFTER_S = 0.5
"""How long after a first signal the second comes."""

_OPTIONS = (
    *("--device-memory-bytes", str(_DEVICE_BYTES), "--resident-memory-bytes", str(48 * _MIB)),
    *("--shared-memory-bytes", str(_SHARED_BYTES), "--spill-memory-bytes", "0"),
    *("--max-message-bytes", str(_MESSAGE_BYTES), "--drain-timeout-s", str(_DRAIN_TIMEOUT_S)),
)


@dataclass(frozen=True)
class Drain:
    """An end by SIGTERM.

    Attributes:
        when: From the signal to the process's end.
        code: Its exit code; None if it had to be killed.
        is_cut: Whether there was a second signal.
    """

    when: Interval
    code: int | None
    is_cut: bool

    @property
    def took_s(self) -> float:
        """How long it took."""
        return self.when[1] - self.when[0]

    @property
    def cut_s(self) -> float:
        """From when on it may end calls that were accepted, on the monotonic clock."""
        return self.when[0] + (_CUT_AFTER_S if self.is_cut else _DRAIN_TIMEOUT_S)

    @property
    def fault(self) -> str:
        """What was wrong with it; empty if nothing was."""
        if self.code is None:
            return f"a drain did not end within {self.took_s:.1f} s"
        return "" if self.code in (0, 4) else f"a drain ended with exit code {self.code}"


@dataclass
class Record:
    """What became of the server.

    Attributes:
        bound_bytes: The memory that it is to keep within.
        absences: From when to when it was away.
        faults: When it ended by itself, and other things that must not be.
        memory_bytes: The most that one of its processes held.
        group_bytes: The most that was charged to its cgroup, and could not be dropped.
    """

    bound_bytes: int
    absences: list[Interval] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    starts_count: int = 0
    kills_count: int = 0
    memory_bytes: int = 0
    group_bytes: int = 0
    threads_count: int = 0
    descriptors_count: int = 0


class Supervisor:
    """Runs the server, and keeps a record of it.

    Args:
        constants: See `server_process`.
    """

    def __init__(
        self,
        directory: Path,
        places: Places,
        group: Cgroup | None,
        constants: Mapping[str, float] | None = None,
    ) -> None:
        parts = Budgets.of(memory_bytes() if group is None else GROUP_BYTES)
        own_bytes = parts.streams_bytes + parts.messages_bytes + 4 * parts.pool_bytes
        self.record = Record(_DEVICE_BYTES + _SHARED_BYTES + own_bytes + PROCESS_BYTES)
        self._directory, self._places, self._group = directory, places, group
        self._constants = constants
        self._running = ExitStack()
        self._server = self._start_server()
        self._seen_s = time.monotonic()

    def watch(self) -> None:
        """Note what it takes, and start it anew if it has ended by itself."""
        code = self._server.process.poll()
        if code is not None:
            fault = f"{_now()}: the server ended by itself, with exit code {code}"
            self.record.faults.append(fault)
            self._restart(self._seen_s)
        self._seen_s = time.monotonic()
        with suppress(OSError, ValueError):  # it is just ending, which the next look sees
            self._note_held(self._server.process.pid)

    def _note_held(self, pid: int) -> None:
        held, record = process_resources(pid), self.record
        if self._group is not None:
            record.group_bytes = max(record.group_bytes, self._group.kept_memory_bytes)
        record.threads_count = max(record.threads_count, held.threads_count)
        record.descriptors_count = max(record.descriptors_count, held.descriptors_count)
        record.memory_bytes = max(record.memory_bytes, peak_memory_bytes(pid))

    def kill(self) -> None:
        """Kill it, and start it anew."""
        began_s = time.monotonic()
        self.record.kills_count += 1
        self._server.process.kill()
        self._restart(began_s)

    def drain(self, *, is_cut: bool = False) -> None:
        """Have it drain, and start it anew; with a second signal if the drain is to be cut."""
        began_s = time.monotonic()
        process = self._server.process
        process.send_signal(signal.SIGTERM)
        allowed_s = _DRAIN_TIMEOUT_S + _LATE_S
        if is_cut:
            time.sleep(_CUT_AFTER_S)
            process.send_signal(signal.SIGTERM)
            allowed_s = _LATE_S
        try:
            code: int | None = process.wait(allowed_s)
        except subprocess.TimeoutExpired:
            code = None
        drain = Drain((began_s, time.monotonic()), code, is_cut)
        self.record.drains.append(drain)
        if drain.fault:
            self.record.faults.append(f"{_now()}: {drain.fault}{', cut short' * is_cut}")
        self._restart(began_s)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _restart(self, away_s: float) -> None:
        self._running.close()
        self._server = self._start_server()
        self.record.absences.append((away_s, time.monotonic()))

    def _start_server(self) -> ServerProcess:
        self.record.starts_count += 1
        folder = self._directory / f"server-{self.record.starts_count}"
        folder.mkdir()
        listen = self._places.unix, self._places.tcp
        options = (*_OPTIONS, "--direct-port", str(self._places.direct_port))
        server = server_process(
            folder, *options, listen=listen, within=self._group, constants=self._constants
        )
        return self._running.enter_context(server)


def _now() -> str:
    return time.strftime("%H:%M:%S")
