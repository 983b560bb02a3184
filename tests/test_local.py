"""`deconvd_client.local`: a server of one's own, which leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection, InvalidArgumentError, UnavailableError
from tests.processes import children_of, exit_code, wait_until

X, W = np.ones((1, 2, 3, 3), np.float32), np.ones((2, 1, 2, 2), np.float32)


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, empty at first. Its path leaves room for a socket's."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def children() -> set[int]:
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for each in lists for pid in each.read_text().split()}


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # an orphan whose new parent does not wait for it
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_server_serves_the_block_and_leaves_nothing(temporary: Path) -> None:
    before = children()
    with deconvd_client.local(threads=1) as F:
        (server,) = children() - before
        (directory,) = temporary.iterdir()
        assert F.deconvolution_2d(X, W).sum() == 72
        assert F.server_info().devices[0].threads_count == 1
        assert F.server_info().direct_port == 0
        assert directory.stat().st_mode & 0o777 == 0o700
        assert os.getsid(server) == server  # Ctrl-C is for this process alone

    assert children() == before
    assert list(temporary.iterdir()) == []


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    before = children()
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with deconvd_client.local():
            (server,) = children() - before
            targets = [os.readlink(fd) for fd in Path(f"/proc/{server}/fd").iterdir()]
            (tmp_path / "open").unlink()

    assert str(tmp_path / "open") not in targets


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": "abacus"}, InvalidArgumentError, "did not start: .*'--device'.*'abacus'"),
        ({"device": 1}, InvalidArgumentError, "device must be a string, got 1"),
        ({"device": "cpu\0"}, InvalidArgumentError, r"device must be a string, got 'cpu\\x00'"),
        ({"thread": 1}, InvalidArgumentError, r"No such option:? '?--thread\b"),
        ({"listen": "127.0.0.1:0"}, InvalidArgumentError, "listen must be an option"),
        ({"drain_timeout_s": 30}, InvalidArgumentError, "drain_timeout_s must be an option"),
        ({"threads": [1]}, InvalidArgumentError, r"threads must be a string.*got \[1\]"),
        ({"transport": "tcp"}, InvalidArgumentError, "transport tcp must have a target"),
    ],
)
def test_wrong_options_are_told(
    temporary: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    before = children()
    with pytest.raises(error, match=text), deconvd_client.local(**options):
        pass

    assert children() == before
    assert list(temporary.iterdir()) == []


def test_a_missing_directory_is_told(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with pytest.raises(UnavailableError, match=r"no directory for its socket.*TMPDIR"):
        with deconvd_client.local():
            pass


@pytest.mark.parametrize("started", [False, True], ids=["before", "during"])
def test_an_interrupt_while_the_server_starts_leaves_no_process(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, obeys_signals: None, started: bool
) -> None:
    """The interrupt strikes the main thread before or while another thread starts the process."""
    before = children()
    popen = subprocess.Popen

    def interrupt_and_start(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        process = popen(*args, **kwargs) if started else None
        signal.raise_signal(signal.SIGINT)
        return process or popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", interrupt_and_start)
    with pytest.raises(KeyboardInterrupt), deconvd_client.local():
        pass

    wait_until(lambda: children() == before)
    wait_until(lambda: list(temporary.iterdir()) == [])


def test_missing_extra_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path/threadpoolctl.py").write_text(
        "raise ModuleNotFoundError(name='threadpoolctl')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))

    with pytest.raises(UnavailableError, match=r"threadpoolctl is missing. Install .* `server`"):
        with deconvd_client.local():
            pass


def test_killed_and_hanging_servers_are_gone_after_the_block(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_client.local_server._STOP_TIMEOUT_S", -1.9)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        before = children()
        with deconvd_client.local():
            (server,) = children() - before
            os.kill(server, number)
        assert children() == before
    assert list(temporary.iterdir()) == []


def test_the_server_outlives_the_thread_that_started_it() -> None:
    manager = deconvd_client.local()
    with ThreadPoolExecutor(1) as pool:
        F = pool.submit(manager.__enter__).result()
    try:
        assert F.deconvolution_2d(X, W).sum() == 72
    finally:
        manager.__exit__(None, None, None)


def test_a_forked_child_leaves_the_server_alone(temporary: Path) -> None:
    manager = deconvd_client.local()
    F: Connection = manager.__enter__()
    try:
        assert exit_code(lambda: not manager.__exit__(None, None, None)) == 0
        assert F.deconvolution_2d(X, W).sum() == 72
    finally:
        manager.__exit__(None, None, None)
    assert list(temporary.iterdir()) == []


def test_the_server_ends_when_its_parent_is_killed(temporary: Path) -> None:
    script = (
        "import deconvd_client, signal\n"
        "with deconvd_client.local() as F:\n"
        "    print('serving', flush=True)\n"
        "    signal.pause()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "serving\n"
        (server,) = children_of(parent.pid)
        had_directory = len(list(temporary.iterdir())) == 1
        parent.kill()
    assert had_directory

    wait_until(lambda: has_ended(server))
    assert list(temporary.iterdir()) == []


def test_the_log_of_the_server_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deconvd_client.local_server")
    with deconvd_client.local(log_level="info"):
        pass

    assert any("SIGTERM: draining" in record.getMessage() for record in caplog.records)
