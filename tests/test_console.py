"""What both commands print, on standard streams of every kind: a latin-1 one, a closed one, a full one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deconvd_client
from deconvd_client import UnavailableError
from tests.processes import wait_until
from tests.servers import ServerProcess

MODULES = {"deconvd": "deconvd_client.cli", "deconvd-server": "deconvd_server"}
each_command = pytest.mark.parametrize("command", MODULES)
each_buffering = pytest.mark.parametrize("unbuffered", ["", "1"])


def shell(command: str, arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with redirections of the shell."""
    return subprocess.run(
        f"exec {sys.executable} -W error -m {MODULES[command]} {arguments}",
        shell=True,
        capture_output=True,
        encoding="latin-1",
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


@each_command
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=str,
)
def test_help_is_printed_in_every_encoding(command: str, environment: dict[str, str]) -> None:
    outcome = shell(command, "--help", **environment)

    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "Usage: " in outcome.stdout


@each_command
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_help_does_without_a_stream_that_is_closed(command: str, closed: str) -> None:
    outcome = shell(command, f"--help {closed}")

    assert (outcome.returncode, outcome.stderr) == (0, "")


@each_command
@each_buffering
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_output_that_cannot_be_written_is_told_in_one_line(
    command: str, unbuffered: str, option: str
) -> None:
    outcome = shell(command, f"{option} >/dev/full", PYTHONUNBUFFERED=unbuffered)

    assert outcome.returncode == 1
    assert outcome.stderr == "Error: cannot write to standard output: No space left on device\n"


@each_command
@each_buffering
def test_a_mistake_that_cannot_be_told_is_still_a_failure(command: str, unbuffered: str) -> None:
    outcome = shell(command, "--nonsense 2>/dev/full", PYTHONUNBUFFERED=unbuffered)

    assert outcome.returncode in (1, 2)


@each_buffering
def test_status_that_cannot_be_written_is_told_in_one_line(
    server: ServerProcess, unbuffered: str
) -> None:
    arguments = f"status --target {server.target} >/dev/full"

    outcome = shell("deconvd", arguments, PYTHONUNBUFFERED=unbuffered)

    assert outcome.returncode == 1
    assert outcome.stderr == "Error: cannot write to standard output: No space left on device\n"


@each_buffering
@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&-", ">&- 2>&-", ">&- 2>/dev/full", "<&- >&- 2>&-", ""]
)
def test_a_server_serves_though_its_greeting_cannot_be_printed(
    socket_directory: Path, redirection: str, unbuffered: str
) -> None:
    target = f"unix:{socket_directory}/deconvd.sock"
    read_end, nobody_reads = os.pipe()
    os.close(read_end)
    process = subprocess.Popen(
        f"exec {sys.executable} -m deconvd_server --device cpu --listen {target} {redirection}",
        shell=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=nobody_reads,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(nobody_reads)
    try:
        wait_until(lambda: serves(target))
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def serves(target: str) -> bool:
    with deconvd_client.connect(target) as F:
        try:
            return F.health() == "SERVING"
        except UnavailableError:
            return False


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_server_greets_with_a_path_of_any_letters(socket_directory: Path, encoding: str) -> None:
    address = f"unix:{socket_directory}/\N{GREEK SMALL LETTER LAMDA}.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "deconvd_server", "--device", "cpu", "--listen", address],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("deconvd-server: listening on unix:")
        assert serves(address)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_file_whose_name_is_no_utf8_is_told_without_a_traceback(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "\udcff.npy"
    path.write_text("not an array")

    outcome = subprocess.run(
        [sys.executable, "-m", "deconvd_client.cli", "run", path, path, "-o", tmp_path / "y.npy"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert outcome.returncode in (1, 2)
    assert ".npy is not an .npy, .npz, .safetensors or PNG file" in outcome.stderr
