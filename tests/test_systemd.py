"""What the server tells systemd, at a real socket, and the unit that starts it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deconvd
from deconvd_server.__main__ import main
from deconvd_server.command_options import unknown_variables
from deconvd_server.exit_codes import ExitCode
from deconvd_server.resources.systemd import SystemdNotifier
from tests.hung_device import PRELUDE
from tests.processes import wait_until
from tests.servers import free_port, server_process
from tests.worker_servers import pid_of, wait_for_serving

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy" / "deconvd-server.service"
README = ROOT / "README.md"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket at which systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        yield listener


def next_message(systemd: socket.socket) -> str:
    return systemd.recv(4096).decode()


def waiting_messages(systemd: socket.socket) -> list[str]:
    messages = []
    systemd.setblocking(False)
    try:
        while True:
            messages.append(next_message(systemd))
    except BlockingIOError:
        return messages
    finally:
        systemd.settimeout(30)


def test_the_server_tells_when_it_is_ready_and_when_it_stops(
    systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname()}
    with server_process(tmp_path, environment=environment) as server:
        ready = next_message(systemd)
        code = server.end(signal.SIGTERM)

    assert (ready, code) == ("READY=1", ExitCode.DRAINED)
    assert waiting_messages(systemd) == ["STOPPING=1"]


def test_it_tells_that_it_is_alive_if_that_is_asked_for(
    systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "300000"}
    with server_process(tmp_path, environment=environment):
        messages = [next_message(systemd) for _ in range(4)]

    assert messages == ["READY=1", *3 * ["WATCHDOG=1"]]


def test_of_several_processes_one_tells_and_kills_another_that_hangs(
    systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "3000000"}
    with server_process(tmp_path, "--processes", "2", environment=environment) as server:
        wait_for_serving(server)
        stopped = pid_of(server, "1")
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: pid_of(server, "1") != stopped)
        wait_for_serving(server)
        code = server.end(signal.SIGTERM)

    first, *_, last = waiting_messages(systemd)
    assert (first, last, code) == ("READY=1", "STOPPING=1", ExitCode.DRAINED)
    assert "worker 1 (cpu) has been silent for 3 s, and is killed" in server.log.read_text()


def test_it_is_silent_about_its_life_if_another_process_is_watched(
    systemd: socket.socket, tmp_path: Path
) -> None:
    address: str = systemd.getsockname()
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}
    notifier = SystemdNotifier(environment)
    notifier.notify_alive()
    notifier.notify_ready()

    assert next_message(systemd) == "READY=1"


def test_a_server_whose_device_hangs_tells_that_it_stops(
    systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname()}
    script = f"{PRELUDE}; tests.hung_device.hang_at_once()"
    timeout = ("--device-timeout-s", "0.2")
    with server_process(tmp_path, *timeout, environment=environment, prelude=script) as server:
        messages = [next_message(systemd) for _ in range(2)]
        code = server.process.wait(30)

    assert (messages, code) == (["READY=1", "STOPPING=1"], ExitCode.DEVICE_HUNG)


def test_a_server_with_a_parent_leaves_systemd_to_it(
    systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname()}
    with server_process(tmp_path, "--parent", str(os.getpid()), environment=environment) as server:
        server.end(signal.SIGTERM)

    assert waiting_messages(systemd) == []


def test_names_without_a_file_are_understood() -> None:
    name = f"deconvd-test-{id(object())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(30)
        SystemdNotifier({"NOTIFY_SOCKET": f"@{name}"}).notify_ready()

        assert next_message(listener) == "READY=1"


def test_a_socket_that_is_gone_is_logged_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SystemdNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).notify_ready()

    assert [record.getMessage() for record in caplog.records] == [
        "cannot tell systemd READY=1: No such file or directory"
    ]


def settings_of_the_unit(name: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2].strip('"') for line in lines if line.startswith(f"{name}=")]


def default_of(name: str) -> float:
    (option,) = [option for option in main.params if option.name == name]
    assert isinstance(option.default, float)
    return option.default


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/deconvd/bin/deconvd-server", sys.executable))

    ended = subprocess.run(
        [verify, "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )

    complaints = [line for line in ended.stderr.splitlines() if UNIT.stem in line]
    assert complaints == []


def test_the_unit_sets_only_variables_that_are_options() -> None:
    names = [value.partition("=")[0] for value in settings_of_the_unit("Environment")]

    assert names
    assert unknown_variables(names, main.variables) == []


def test_the_unit_waits_longer_than_a_drain_and_restarts_by_the_exit_codes() -> None:
    (stop_s,) = settings_of_the_unit("TimeoutStopSec")

    assert float(stop_s) > default_of("drain_timeout_s") + 2
    assert settings_of_the_unit("RestartPreventExitStatus") == [str(int(ExitCode.WRONG_OPTION))]
    assert settings_of_the_unit("SuccessExitStatus") == [str(int(ExitCode.CUT_SHORT))]


def test_the_readme_has_each_exit_code() -> None:
    table = README.read_text().partition("| exit code |")[2].partition("\n\n")[0]
    codes = [row.split("|")[1].strip() for row in table.splitlines()[2:]]

    assert codes == [str(int(code)) for code in ExitCode]


def test_help_has_each_exit_code() -> None:
    text = (main.help or "").partition("Exit codes:")[2]

    assert all(f"{int(code)} " in text for code in ExitCode)


def test_the_log_has_one_line_about_what_serves_where(tmp_path: Path) -> None:
    options = ("--device-memory-bytes", "64Mi", "--max-message-bytes", "5Mi")
    listen = ("unix", "127.0.0.1:0")
    with server_process(
        tmp_path,
        *options,
        *("--shared-memory-bytes", "16Mi", "--resident-memory-bytes", "8Mi"),
        *("--spill-memory-bytes", "4Mi", "--health-port", str(free_port())),
        *("--metrics-port", "0"),
        listen=listen,
    ) as server:
        wait_until(lambda: " serves on " in server.log.read_text())
        (line,) = [line for line in server.log.read_text().splitlines() if " serves on " in line]

    for part in (
        f"serves on unix:{tmp_path}/deconvd.sock (callers: all users who may open the socket), ",
        f", {server.targets[1]} (not encrypted; callers: everyone on this host), ",
        ", direct calls on port ",
        "devices: cpu (",
        f"{64 << 20} bytes, of them {8 << 20} for residents, ",
        f"messages up to {5 << 20} bytes",
        f"{16 << 20} shared, {4 << 20} spilled",
        " (health alone)",
        " (metrics)",
        f"deconvd {deconvd.__version__} serves",
    ):
        assert part in line, line
