"""A server process of one's own, which runs for as long as a block of code."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from deconvd.errors import DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.host.startup_line import address_in_startup_line
from deconvd.host.system import is_valid_unix_path
from deconvd_client.calls.uninterrupted import call_uninterrupted
from deconvd_client.connection import Connection
from deconvd_client.connector import connect
from deconvd_client.transports.route import TransportName

__all__ = ["ServerOption", "local", "run_server"]

ServerOption: TypeAlias = str | int | float | bool | Path | None

_START_TIMEOUT_S: Final = 120.0
"""Longer than the first use of a GPU takes."""

_STOP_TIMEOUT_S: Final = 5.0
"""How long a server may take for its end, in addition to its drain, before it is killed."""

_DRAIN_TIMEOUT_S: Final = 2.0
"""How long its calls may take to end: the block that made them has ended."""

_WRONG_OPTION: Final = 2
"""The server's exit code if an option is wrong."""

_LAST_LINES_COUNT: Final = 20

_RESERVED: Final = frozenset({"drain_timeout_s", "listen", "parent"})

_OPTION_NAME: Final = re.compile(r"[a-z][a-z_]*")

_LOG_LEVEL: Final = re.compile(r"\S+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")

_log = logging.getLogger(__name__)


@contextmanager
def local(
    device: str = "cpu",
    *,
    timeout_s: float = 60.0,
    transport: str = TransportName.AUTO,
    tenant_key: str | bytes | None = None,
    **options: ServerOption,
) -> Iterator[Connection]:
    """Run a server for a ``with`` block, and return a connection to it.

    ::

        with deconvd_client.local(device="cuda") as F:
            y = F.deconvolution_2d(x, W, stride=2, pad=1)

    The server is a process of this host. It listens on a Unix socket that only this user can reach, and on no TCP port.
    It ends with the block, or with this process, even if that is killed. It needs deconvd's extra ``server``. Its log
    goes to the logger ``deconvd_client.local_server``.

    Args:
        device: The devices to compute on, as in the server's ``--device``: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        timeout_s: As in `connect`.
        transport: As in `connect`.
        tenant_key: As in `connect`.
        **options: Other options of ``deconvd-server``, with underscores: ``threads=2``, ``plan_store=path``,
            ``device_memory_bytes="4G"``, ``direct_calls=False``. Those that are not given have their defaults, or the
            values that the environment sets, except that ``log_level`` is warning. ``drain_timeout_s`` is always 2.

    Raises:
        InvalidArgumentError: There is no such option, or it cannot have that value (a ValueError).
        UnavailableError: The server cannot start: there is no such card, or the extra ``server`` is missing (a
            ConnectionError). The message is the server's own.
    """
    with _private_directory() as directory:
        address = f"unix:{directory}/deconvd.sock"
        with (
            # first: if an argument is wrong, no server is started
            connect(
                address,
                timeout_s=timeout_s,
                transport=transport,
                tenant_key=tenant_key,
                tls=False,  # a Unix socket has none, whatever the environment says
            ) as connection,
            run_server(device, address, options),
        ):
            try:
                yield connection
            finally:
                connection.close()  # before its server ends


@contextmanager
def run_server(
    device: str, address: str, options: Mapping[str, ServerOption] | None = None
) -> Iterator[str]:
    """Run a server for a ``with`` block, and return the target to connect to.

    Args:
        device: The server's ``--device``.
        address: Where it listens: ``host:port``, with port 0 for any free port, or ``unix:path``.
        options: As for `local`.

    Raises:
        InvalidArgumentError, UnavailableError: As for `local`.
    """
    server = _LocalServer(_command(device, address, options or {}))
    try:
        # in another thread: an interrupt in the middle of it would leave a process that nobody knows
        call_uninterrupted(server.start)
        yield server.wait_until_ready()
    finally:
        server.stop()


class _LocalServer:
    """A server process, and the thread that reads its log.

    A forked child of this process leaves the server alone: it is not the child's.
    """

    def __init__(self, command: list[str]) -> None:
        self._owner = os.getpid()
        self._command = command
        self._lines: deque[str] = deque(maxlen=_LAST_LINES_COUNT)
        self._lock = threading.Lock()
        self._is_stopped = False
        self._started: subprocess.Popen[str] | None = None
        self._log_reader = threading.Thread(
            target=self._read_log, name="deconvd-local-log", daemon=True
        )

    def start(self) -> None:
        """Start it, unless it was stopped before."""
        with self._lock:
            if self._is_stopped:
                return
            # In a session of its own: Ctrl-C in a terminal, or a notebook's interrupt, is for this process alone.
            self._started = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
                start_new_session=True,
            )
            self._log_reader.start()

    @property
    def _process(self) -> subprocess.Popen[str]:
        assert self._started is not None
        return self._started

    def wait_until_ready(self) -> str:
        """Wait until it serves, and return its target."""
        assert self._process.stdout is not None
        timer = threading.Timer(_START_TIMEOUT_S, self._process.kill)
        timer.daemon = True
        timer.start()
        line = self._process.stdout.readline()  # empty if the process ends first
        is_late = not timer.is_alive()
        timer.cancel()
        if not line:
            raise self._start_error(is_late)
        return address_in_startup_line(line)

    def stop(self) -> None:
        """End it, and wait for its end; kill it if it does not end in time."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._is_stopped = True
        if self._started is None:
            return
        try:
            self._process.terminate()
            self._process.wait(_DRAIN_TIMEOUT_S + _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _log.warning("the local server does not end, and is killed")
        finally:  # also if Ctrl-C ends the wait
            self._process.kill()
            self._process.wait()
            self._log_reader.join()
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None
                stream.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.rstrip()
            if text:
                self._lines.append(text)
            if match := _LOG_LEVEL.match(text):
                _log.log(getattr(logging, match[1]), "%s", text)

    def _start_error(self, is_late: bool) -> DeconvdError:
        code = self._process.wait()
        self._log_reader.join()
        if is_late:
            return UnavailableError(f"the local server was not ready within {_START_TIMEOUT_S:g} s")
        reason = self._lines[-1] if self._lines else f"it ended with exit code {code}"
        for prefix in ("Error: ", "deconvd-server: "):
            reason = reason.removeprefix(prefix)
        text = f"the local server did not start: {reason}"
        return InvalidArgumentError(text) if code == _WRONG_OPTION else UnavailableError(text)


@contextmanager
def _private_directory() -> Iterator[Path]:
    """Make a directory for this user alone, short enough for a socket, and remove it after the block.

    A forked child leaves it, as it does the server.
    """
    owner = os.getpid()
    try:
        directory = Path(tempfile.mkdtemp(prefix="deconvd-local-"))
        if not is_valid_unix_path(directory / "deconvd.sock.memory"):
            directory.rmdir()
            directory = Path(tempfile.mkdtemp(prefix="deconvd-local-", dir="/tmp"))
    except OSError as error:
        raise UnavailableError(
            f"the local server did not start: it has no directory for its socket ({error}). TMPDIR in the environment "
            "names another place."
        ) from error
    try:
        yield directory
    finally:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)  # a killed server leaves its sockets


def _command(device: str, address: str, options: Mapping[str, ServerOption]) -> list[str]:
    if not sys.executable:
        raise UnavailableError(
            "the local server did not start: this program does not know its Python (sys.executable is empty)"
        )
    if not isinstance(device, str) or "\0" in device:
        raise InvalidArgumentError(f"device must be a string, got {device!r}", argument="device")
    given: dict[str, ServerOption] = {"log_level": "warning", **options}
    # -P: a file of the current directory must not replace a module
    command = [sys.executable, "-P", "-m", "deconvd_server", f"--parent={os.getpid()}"]
    command += [f"--device={device}", f"--listen={address}"]
    command.append(f"--drain-timeout-s={_DRAIN_TIMEOUT_S}")
    for name, value in given.items():
        if value is not None:
            command.append(_option_word(name, value))
    return command


def _option_word(name: str, value: ServerOption) -> str:
    """Return an option as the server's command line has it.

    Raises:
        InvalidArgumentError: `local` sets the option itself, or it cannot be given as a word.
    """
    if name in _RESERVED or not _OPTION_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{name} must be an option of deconvd-server that a local server can have, as in threads=2, "
            f"got {name}={value!r}",
            argument=name,
        )
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{option.removeprefix('--')}"
    if not isinstance(value, (str, int, float, Path)) or "\0" in str(value):
        raise InvalidArgumentError(
            f"{name} must be a string, a number, a path, True, False or None, got {value!r}",
            argument=name,
        )
    return f"{option}={value}"
