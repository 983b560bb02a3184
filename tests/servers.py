"""Real servers in processes of their own, for tests from the outside."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.ports import free_port
from deconvd.host.startup_line import address_in_startup_line
from deconvd.model.dtypes import Array
from deconvd_client import Connection, UnavailableError
from deconvd_client.server import Server
from deconvd_client.workers.host import Host
from tests.processes import wait_until

__all__ = [
    "GRAPHS_SOON",
    "ServerProcess",
    "call_until_served",
    "free_port",
    "only_server",
    "server_process",
    "stop_server",
]

GRAPHS_SOON = {"deconvd_server.device.cuda.execution.graph_cache:_CAPTURE_S": 0.0}
"""Constants with which a card's work is captured the second time that it comes: tests make few calls."""

_END_TIMEOUT_S = 30
_COVERAGE_TIMEOUT_S = 4
"""How long a server that is measured may take for its end before it is asked again, or killed."""


class Surroundings(Protocol):
    """What a process can be run in: a cgroup, or a network namespace."""

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that runs another one within, under the same process id."""


@dataclass
class ServerProcess:
    """A running ``deconvd-server``.

    Attributes:
        targets: What a client connects to, one for each address.
        log: File that its standard error goes to.
    """

    process: subprocess.Popen[str]
    targets: list[str]
    log: Path

    @property
    def target(self) -> str:
        """The first of its targets."""
        return self.targets[0]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, wait for its end, and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(_END_TIMEOUT_S)


@contextmanager
def server_process(
    directory: Path,
    *options: str,
    device: str = "cpu",
    listen: tuple[str, ...] = ("unix",),
    within: Surroundings | None = None,
    constants: Mapping[str, float] | None = None,
    descriptors_count: int | None = None,
    limits: Mapping[int, int] | None = None,
    prelude: str = "",
    environment: Mapping[str, str] | None = None,
    chooses_processes: bool = False,
) -> Iterator[ServerProcess]:
    """Run ``deconvd-server`` for the block, on a Unix socket in `directory` by default.

    Its TCP ports, for direct calls as well, are those of `free_port`. So they are free on all addresses of this host
    (for a proxy, say), and as long as it is away.

    Args:
        constants: Values for constants of its modules, by ``module:name``: limits that are too long for a test.
        descriptors_count: How many descriptors it may have; None for as many as this process.
        within: What to run it in.
        limits: Other limits, as of `resource.setrlimit`, by their numbers.
        prelude: Python that its process runs first: to put another device in, say.
        environment: Variables that it has in addition to those of this process.
        chooses_processes: Whether it is left to the server in how many processes it serves. Otherwise it is one,
            whatever the host has, unless the options say ``--processes``.
        listen: Addresses; "unix" for a socket in `directory`, port 0 for any free port.
    """
    addresses = [_with_place(address, directory) for address in listen]
    if not any(o.startswith("--direct-port") for o in options) and not all(
        map(_is_unix, addresses)
    ):
        # processes have ports that follow each other
        count = int(options[options.index("--processes") + 1]) if "--processes" in options else 1
        options = (*options, "--direct-port", str(free_port(max(count, 1))))
    if not chooses_processes and not any(o.startswith("--processes") for o in options):
        options = (*options, "--processes", "0")
    log = directory / "server.log"
    all_limits = dict(limits or {})
    if descriptors_count is not None:
        all_limits[resource.RLIMIT_NOFILE] = descriptors_count
    command = [
        sys.executable,
        "-W",
        "error",
        *_module(constants, prelude),
        "--device",
        device,
        *options,
    ]
    command += [word for address in addresses for word in ("--listen", address)]
    if all_limits:
        command = _with_limits(all_limits, command)
    with log.open("w") as errors:
        process = subprocess.Popen(
            within.command(command) if within else command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in addresses]
        assert all(lines), log.read_text()
        yield ServerProcess(process, [*map(address_in_startup_line, lines)], log)
    finally:
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            _let_it_write_its_coverage(process)
        process.kill()
        process.wait()
        process.communicate()


def _with_place(address: str, directory: Path) -> str:
    if address == "unix":
        return f"unix:{directory}/deconvd.sock"
    host, _, port = address.rpartition(":")
    return f"{host}:{free_port()}" if port == "0" else address


def _is_unix(address: str) -> bool:
    return address.startswith("unix:")


def _let_it_write_its_coverage(process: subprocess.Popen[str]) -> None:
    """End a server by a signal that it hears: what is killed writes down nothing.

    The first signal drains it. The second cancels the calls that a drain waits for.
    """
    for _ in range(2):
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(_COVERAGE_TIMEOUT_S)
            return


def _module(constants: Mapping[str, float] | None, prelude: str) -> list[str]:
    """Return the words that have Python run the server, with other values for some constants."""
    if not constants and not prelude:
        return ["-m", "deconvd_server"]
    settings = [(*name.split(":"), value) for name, value in (constants or {}).items()]
    script = (
        f"{prelude}\n"
        "import importlib\n"
        f"for module, name, value in {settings!r}:\n"
        "    module = importlib.import_module(module)\n"
        "    assert hasattr(module, name)\n"
        "    setattr(module, name, value)\n"
        "from deconvd_server.__main__ import main\n"
        "main()"
    )
    return ["-c", script]


def _with_limits(limits: Mapping[int, int], command: list[str]) -> list[str]:
    """Return a command that runs another one within limits, under the same process id.

    They are not set between a fork of this process and the program's start (`preexec_fn`): gRPC's threads do not
    outlive a fork.
    """
    script = (
        "import os, resource, sys\n"
        f"for number, limit in {dict(limits)!r}.items():\n"
        "    resource.setrlimit(number, (limit, limit))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", script, *command]


@contextmanager
def stop_server(server: ServerProcess) -> Iterator[None]:
    """Stop a server for the block, as a debugger or a full swap does: it is there and says nothing."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: _has_stopped(server.process.pid))  # a thread may be about to answer
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def _has_stopped(pid: int) -> bool:
    stats = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def only_server(F: Connection) -> Server:
    """Return the client's side of the server of a connection that has only one."""
    assert isinstance(F._server, Host)
    return F._server.entry


def call_until_served(F: Connection, x: Array, W: Array) -> Array:
    """Call until the server is there: calls wait neither for one that was never reached nor for a pinned way."""
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while True:
        try:
            return F.deconvolution_2d(x, W)
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
