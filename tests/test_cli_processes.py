"""`deconvd run` as a process: its memory, its bar, interrupts, and shells that complete its words."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection
from deconvd_client.cli.inputs import read_array
from tests.client_command import COMMAND, deconvd, read_terminal
from tests.fault_proxy import FaultProxy, LinkConditions, faulty_proxy
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.tcp_proxy import Direction, Fault

X = np.random.default_rng(0).standard_normal((8, 4, 64, 64)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((4, 4, 1, 1)).astype(np.float32)
ENLARGE = ["--stride", "4", "--outsize", "256,256"]
Y_BYTES = 8 * 4 * 256 * 256 * 4
TRANSPORTS = ["auto", "shared_memory", "unix", "tcp", "grpc"]

HUNG = LinkConditions(fault=Fault.HANG, direction=Direction.DOWN, after_bytes=Y_BYTES // 2)

LARGE_LIMIT_BYTES = 400 << 20


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    with server_process(directory, listen=("127.0.0.1:0", "unix")) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "W.npy", W)
    return tmp_path


@contextmanager
def hung_command(
    proxy: FaultProxy, files: Path, output: str, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """Run the command until half of its result has come, and nothing more comes."""
    command = ["run", "x.npy", "W.npy", *ENLARGE, "-o", output, "--target", proxy.target]
    process = subprocess.Popen(
        [*COMMAND, *command, "--transport", "grpc"],
        cwd=files,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONFAULTHANDLER": "1"},
        stderr=stderr,
        text=True,
    )
    try:
        wait_until(lambda: proxy.faults_count > 0)
        yield process
    finally:
        process.kill()
        process.wait(60)
        if process.stderr is not None:
            process.stderr.close()


def read_errors(process: subprocess.Popen[str]) -> str:
    """Wait until a command has ended; return what it wrote to standard error. One that hangs says where."""
    try:
        return process.communicate(timeout=90)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # makes faulthandler write what each thread does
        pytest.fail(f"the command hangs: {process.communicate(timeout=90)[1]}")


@pytest.mark.parametrize("output", ["y.npy", "y.npz"])
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "Interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_command_that_is_ended_leaves_neither_files_nor_its_call(
    tcp_server: ServerProcess,
    files: Path,
    obeys_signals: None,
    output: str,
    number: int,
    code: int,
    message: str,
) -> None:
    (files / output).write_text("an older result")
    before = set(files.iterdir())

    with (
        deconvd_client.connect(tcp_server.targets[1]) as F,
        faulty_proxy(tcp_server.target, HUNG) as proxy,
        hung_command(proxy, files, output) as process,
    ):
        process.send_signal(number)
        errors = read_errors(process)

        assert (process.returncode, errors) == (code, message)
        wait_until(lambda: not any(d.running_calls_count for d in F.server_info().devices))
    assert set(files.iterdir()) == before
    assert (files / output).read_text() == "an older result"


def test_a_call_that_fails_leaves_no_file(tcp_server: ServerProcess, files: Path) -> None:
    before = set(files.iterdir())
    command = ["run", "x.npy", "W.npy", *ENLARGE, "-o", "y.npy", "--transport", "grpc"]
    with faulty_proxy(tcp_server.target, HUNG) as proxy:
        outcome = deconvd(*command, "--timeout-s", "2", "--target", proxy.target, cwd=files)

    assert outcome.returncode == 1
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    assert set(files.iterdir()) == before


def test_a_terminal_is_shown_how_much_has_travelled(
    tcp_server: ServerProcess, files: Path, obeys_signals: None
) -> None:
    terminal, its_end = pty.openpty()
    sent_mb, all_mb = (X.nbytes + W.nbytes) / 1e6, (X.nbytes + W.nbytes + Y_BYTES) / 1e6
    pattern = rf"receiving[^\r\n]* ([\d.]+)/{all_mb:.1f} MB"

    with (
        faulty_proxy(tcp_server.target, HUNG) as proxy,
        hung_command(proxy, files, "y.npy", stderr=its_end) as process,
    ):
        os.close(its_end)
        shown = read_terminal(terminal, pattern)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    os.close(terminal)

    arrived_mb = float(re.findall(pattern, shown)[0])
    assert sent_mb < arrived_mb <= sent_mb + Y_BYTES / 2e6 + 0.1


def test_a_terminal_is_shown_nothing_where_it_should_be_quiet(
    tcp_server: ServerProcess, files: Path
) -> None:
    terminal, its_end = pty.openpty()
    command = ["run", "x.npy", "W.npy", "-o", "y.npy", "--quiet", "--target", tcp_server.target]

    process = subprocess.run([*COMMAND, *command], cwd=files, stderr=its_end, check=False)

    os.write(its_end, b"the end")
    assert process.returncode == 0
    assert os.read(terminal, 1 << 16) == b"the end"
    os.close(its_end)
    os.close(terminal)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_transport_writes_the_same_file(
    tcp_server: ServerProcess, F: Connection, files: Path, transport: str
) -> None:
    gy = F.deconvolution_2d(X, W, stride=4, outsize=(256, 256))
    np.save(files / "gy.npy", gy)
    command = ["run", "x.npy", "W.npy", *ENLARGE, "--transport", transport, "--json"]
    command += ["--target", tcp_server.target]

    plain = deconvd(*command, "-o", "y.npy", cwd=files)
    grad = deconvd(*command, "-o", "g.npz", "--grad", "gy.npy", cwd=files)

    assert plain.returncode == grad.returncode == 0, plain.stderr + grad.stderr
    np.testing.assert_array_equal(np.load(files / "y.npy"), gy)
    expected = F.deconvolution_2d_grad(X, W, None, gy, 4, outsize=(256, 256))._asdict()
    with np.load(files / "g.npz") as written:
        assert set(written) == {"gx", "gW"}
        for name in written:  # gW is a sum over samples, whose order the transport decides
            np.testing.assert_allclose(written[name], expected[name], rtol=1e-4, atol=1e-3)
    travelled = json.loads(plain.stdout)["transport"]
    assert travelled == ("shared_memory" if transport == "auto" else transport)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "output"),
    [*((each, "y.npy") for each in TRANSPORTS), ("tcp", "y.npz"), ("grpc", "y.safetensors")],
)
def test_tensors_of_a_gigabyte_need_no_memory_of_the_command(
    tcp_server: ServerProcess, tmp_path: Path, transport: str, output: str
) -> None:
    shape = (64, 64, 128, 128)  # 256 MiB in, 1 GiB out
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)
    x[::7] = 1.0
    x.flush()
    np.save(tmp_path / "W.npy", np.eye(64, dtype=np.float32)[:, :, np.newaxis, np.newaxis] * 3)
    command = ["run", "x.npy", "W.npy", "--stride", "2", "--outsize", "256,256", "-o", output]
    command += ["--transport", transport, "--target", tcp_server.target]

    peak_bytes, code = peak_own_memory([*COMMAND, *command], tmp_path)

    assert code == 0
    assert peak_bytes <= LARGE_LIMIT_BYTES
    y = read_array(str(tmp_path / output))
    assert y.shape == (64, 64, 256, 256)
    assert (y[::7, :, ::2, ::2] == 3).all()
    assert not y[1].any()
    assert not y[7, :, 1::2].any()


def peak_own_memory(command: list[str], cwd: Path) -> tuple[int, int]:
    """Run a command; return the most that it had of memory of its own and of shared memory, and its exit code."""
    process = subprocess.Popen(command, cwd=cwd)
    status = Path(f"/proc/{process.pid}/status")
    peak_kib = 0

    def has_ended() -> bool:
        nonlocal peak_kib
        sizes = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status.read_text(), re.MULTILINE)
        peak_kib = max(peak_kib, sum(map(int, sizes)))
        return process.poll() is not None

    try:
        wait_until(has_ended, timeout_s=200)  # it may move gigabytes
    finally:
        process.kill()
        process.wait(60)
    assert peak_kib > 0
    return peak_kib << 10, process.returncode


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("deconvd r", ["run"]),
        ("deconvd run --str", ["--stride"]),
        ("deconvd run --use-cudnn a", ["auto", "always"]),
    ],
)
def test_bash_completes_words(tmp_path: Path, words: str, expected: list[str]) -> None:
    (tmp_path / "deconvd").write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    (tmp_path / "deconvd").chmod(0o755)
    script = (
        'eval "$(_DECONVD_COMPLETE=bash_source deconvd)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}\n"
        "_deconvd_completion deconvd; echo ${COMPREPLY[@]}"
    )

    outcome = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (outcome.stdout.split(), outcome.stderr) == (expected, "")
