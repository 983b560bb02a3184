"""`deconvd top` and what `deconvd status` counts, as processes that watch real servers."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import deconvd_client
from deconvd.v1 import deconvd_pb2 as pb
from tests.client_command import COMMAND, deconvd
from tests.servers import ServerProcess, server_process

X = np.ones((1, 1, 3, 3), np.float32)
W = np.ones((1, 1, 1, 1), np.float32)
MAX_LINES_COUNT = 300


@contextmanager
def watching(target: str, *options: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """Run the command until the end of the block."""
    process = subprocess.Popen(
        [*COMMAND, "top", target, "--interval-s", "0.2", *options],
        env=os.environ | {"TERM": "xterm"},
        text=True,
        **({"stdout": subprocess.PIPE} | streams),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def readings(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield what a command with --json prints, for a minute at most."""
    assert process.stdout is not None
    for _ in range(MAX_LINES_COUNT):
        yield json.loads(process.stdout.readline())


def calls_count(reading: dict[str, Any], method: str, transport: str) -> float:
    """Return how many calls of a method by a transport have ended in an interval."""
    calls_per_s: list[float] = [
        each["calls_per_s"]
        for each in reading["methods"]
        if (each["method"], each["transport"]) == (method, transport)
    ]
    return sum(calls_per_s) * float(reading["duration_s"])


def test_each_call_is_in_one_interval(server: ServerProcess) -> None:
    total = 0.0
    with (
        watching(server.target, "--json") as process,
        deconvd_client.connect(server.target, transport="grpc") as F,
        ThreadPoolExecutor(1) as caller,
    ):
        lines = readings(process)
        first = next(lines)
        done = caller.submit(lambda: [F.deconvolution_2d(X, W) for _ in range(50)])
        for reading in lines:
            total += calls_count(reading, "Deconvolve", "grpc")
            if done.done() and total > 49.5:
                break

    assert (first["state"], first["error"]) == ("serving", None)
    assert total == pytest.approx(50)


def test_lines_are_printed_where_there_is_no_terminal(
    server: ServerProcess, tmp_path: Path
) -> None:
    outcome = deconvd("top", "--target", server.target, "--count", "2", cwd=tmp_path)

    lines = outcome.stdout.splitlines()
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert len(lines) == 2
    for line in lines:
        assert re.match(
            r"\d\d:\d\d:\d\d  [\d.]+ calls/s, [\d.]+ failed/s, .*B/s in, .*/s out", line
        )
        assert re.search(r"cpu: \d+ % busy, \d+ running, \d+ waiting, .*B of ", line)


def read_screen(terminal: int, pattern: str) -> str:
    """Return what a terminal has shown, without colors, once a pattern has come."""
    shown = ""
    while not re.search(pattern, shown, re.DOTALL):
        readable, _, _ = select.select([terminal], [], [], 30)
        assert readable, shown
        shown += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(terminal, 1 << 16).decode())
    return shown


@contextmanager
def open_terminal() -> Iterator[tuple[int, int]]:
    """Give both ends of a terminal of 40 lines: ours, and that of the program that draws."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
    try:
        yield ours, its
    finally:
        os.close(ours)
        os.close(its)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "Interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_a_terminal_is_shown_tables_until_a_signal_ends_them(
    server: ServerProcess, obeys_signals: None, number: int, code: int, message: str
) -> None:
    with (
        deconvd_client.connect(server.target, transport="grpc") as F,
        open_terminal() as (terminal, its),
        watching(server.target, stdout=its, stderr=subprocess.PIPE) as process,
    ):
        F.deconvolution_2d(X, W)
        heads = "calls/s.*failed/s.*Deconvolve +grpc +.*device +busy.*cpu: .*host memory.*shared"
        read_screen(terminal, heads)
        process.send_signal(number)
        _, errors = process.communicate(timeout=90)

        assert (process.returncode, errors) == (code, message)
        os.write(its, b"the end")
        left = b""
        while b"the end" not in left:
            left += os.read(terminal, 1 << 16)
    assert b"\x1b[?1049l" in left  # the screen that was there before
    assert b"\x1b[?25h" in left  # the cursor


def test_a_terminal_needs_rich_and_the_error_says_how_to_get_it(server: ServerProcess) -> None:
    script = (
        "import sys\nsys.modules['rich'] = sys.modules['rich.console'] = None\n"
        "from deconvd_client.cli import main\nmain(prog_name='deconvd')"
    )
    with open_terminal() as (_, its):
        outcome = subprocess.run(
            [sys.executable, "-c", script, "top", server.target],
            stdout=its,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert outcome.returncode == 1
    assert outcome.stderr.startswith("Error: deconvd top needs the package rich on a terminal: pip")


def test_a_server_that_goes_and_comes_back_is_shown_as_such(
    socket_directory: Path, obeys_signals: None
) -> None:
    with server_process(socket_directory) as first:
        with watching(first.target, "--json", stderr=subprocess.PIPE) as process:
            lines = readings(process)
            assert next(lines)["state"] == "serving"
            first.process.kill()
            for reading in lines:
                if reading["state"] == "away":
                    break
            assert "unix:" in reading["error"]
            assert "calls_per_s" not in reading
            with (
                server_process(socket_directory) as second,
                deconvd_client.connect(second.target, transport="grpc") as F,
            ):
                for _ in range(7):
                    F.deconvolution_2d(X, W)
                serving: list[dict[str, Any]] = []
                total = 0.0
                for reading in lines:
                    if reading["state"] == "serving":
                        serving.append(reading)
                        total += calls_count(reading, "Deconvolve", "grpc")
                    if total > 6.5:
                        break

            assert [each["is_restarted"] for each in serving] == [True] + [False] * (
                len(serving) - 1
            )
            assert total == pytest.approx(7)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=90)
    assert (process.returncode, errors) == (130, "Interrupted\n")


def test_a_server_that_never_answers_is_a_failure_after_count_lines(tmp_path: Path) -> None:
    outcome = deconvd(*("top", "unix:nobody", "--count", "2", "--interval-s", "0.1"), cwd=tmp_path)

    assert outcome.returncode == 1
    assert outcome.stdout.count(" is away: ") == len(outcome.stdout.splitlines()) == 2
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interval-s", "0"], "--interval-s: must be at least 0.1, got 0"),
        (["--interval-s", "nan"], "--interval-s: must be at least 0.1, got nan"),
        (["--interval-s", "inf"], "--interval-s: must be at least 0.1, got inf"),
        (["--count", "0"], "0 is not in the range x>=1"),
        (["nowhere"], "target must be host:port or unix:path"),
        (
            ["unix:a", "--target", "unix:b"],
            "TARGET and --target name two servers, unix:a and unix:b",
        ),
    ],
)
def test_a_mistake_ends_top_with_one_clear_line(
    tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = deconvd("top", *options, cwd=tmp_path)

    assert outcome.returncode == 2
    assert message in outcome.stderr


@pytest.fixture
def old_target() -> Iterator[str]:
    """The address of a server of before there were counts."""
    service = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name
    device = pb.Device(id="cpu", name="a processor", budget_bytes=1000, used_bytes=10)
    info = pb.GetServerInfoResponse(version="0.0.1", devices=[device]).SerializeToString()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: info
    )
    statuses = health.HealthServicer()
    statuses.set(service, health_pb2.HealthCheckResponse.SERVING)
    with ThreadPoolExecutor(2) as handlers:
        server = grpc.server(handlers)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"GetServerInfo": handler}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_an_old_server_is_shown_without_counts(old_target: str, tmp_path: Path) -> None:
    status = deconvd("status", "--target", old_target, cwd=tmp_path)
    as_json = deconvd("status", "--json", "--target", old_target, cwd=tmp_path)
    line = deconvd("top", old_target, "--count", "1", "--interval-s", "0.1", cwd=tmp_path)

    assert (status.returncode, status.stderr) == (0, "")
    assert "deconvd 0.0.1" in status.stdout
    assert "busy" not in status.stdout
    assert json.loads(as_json.stdout)["counts"] is None
    assert re.fullmatch(r"\d\d:\d\d:\d\d  cpu: 0 running, 0 waiting, 10 B of 1.0 kB\n", line.stdout)


def test_status_shows_what_the_server_has_done(socket_directory: Path) -> None:
    with server_process(socket_directory) as server:
        with deconvd_client.connect(server.target, transport="grpc") as F:
            for _ in range(3):
                F.deconvolution_2d(X, W)

        text = deconvd("status", "--target", server.target, cwd=socket_directory)
        as_json = deconvd("status", "--json", "--target", server.target, cwd=socket_directory)

    bytes_text = f"{3 * (X.nbytes + W.nbytes)} B in, {3 * X.nbytes} B out"
    assert f"Deconvolve by grpc: 3 OK, 0 running, {bytes_text}" in text.stdout
    assert "compute: 3 calls, " in text.stdout
    counts = json.loads(as_json.stdout)["counts"]
    (deconvolve,) = (each for each in counts["methods"] if each["method"] == "Deconvolve")
    assert deconvolve["ended"] == {"OK": 3}
    assert {each["stage"] for each in counts["stages"]} >= {"queue", "compute", "server"}
    assert counts["uptime_us"] > 0
