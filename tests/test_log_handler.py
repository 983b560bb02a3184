"""Records that repeat are written once a second, with their number."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd_client.transports.route import TransportName
from deconvd_server import log_handler
from deconvd_server.log_handler import REPEAT_KEY, LogHandler
from deconvd_server.log_stream import LogStream
from deconvd_server.log_text import LogFormatter
from tests.direct_calls import open_stream
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.soak.places import connect_unix
from tests.token_calls import write_tokens

TOKEN = "dcd_" + "a-good_token" * 3

X = np.ones((1, 1, 4, 4), np.float32)
W = np.ones((1, 1, 2, 2), np.float32)
HUGE = np.broadcast_to(np.float32(0), (1, 1, 1 << 12, 1 << 12))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_handler, "time", clock)
    return clock


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log = logging.getLogger("test")
    log.propagate = False
    handler = LogHandler(io.StringIO())
    handler.setFormatter(LogFormatter())
    log.addHandler(handler)
    yield log
    log.removeHandler(handler)
    handler.close()


def handler_of(log: logging.Logger) -> LogHandler:
    (handler,) = [handler for handler in log.handlers if isinstance(handler, LogHandler)]
    return handler


def written(log: logging.Logger) -> list[str]:
    stream = handler_of(log).stream
    assert isinstance(stream, io.StringIO)
    return [line.partition("test: ")[2] for line in stream.getvalue().splitlines()]


def warn(log: logging.Logger, text: str, key: object) -> None:
    log.warning(text, extra={REPEAT_KEY: key})


def test_the_first_of_equal_records_is_written_at_once(log: logging.Logger, clock: Clock) -> None:
    for number in range(5):
        warn(log, f"refused {number}", "refused")

    assert written(log) == ["refused 0"]


def test_the_last_one_is_written_with_the_count_when_the_second_is_over(
    log: logging.Logger, clock: Clock
) -> None:
    for number in range(5):
        warn(log, f"refused {number}", "refused")
    handler_of(log).write_repeats()
    clock.now_s += 1
    handler_of(log).write_repeats()

    assert written(log) == ["refused 0", "refused 4 (and 3 more like this)"]


def test_a_flood_is_one_line_a_second(log: logging.Logger, clock: Clock) -> None:
    for _ in range(10):
        for _ in range(100):
            warn(log, "refused", "refused")
        clock.now_s += 1
        handler_of(log).write_repeats()

    assert written(log) == [
        "refused",
        "refused (and 98 more like this)",
        *9 * ["refused (and 99 more like this)"],
    ]


def test_after_a_quiet_second_a_record_is_written_at_once_again(
    log: logging.Logger, clock: Clock
) -> None:
    warn(log, "refused", "refused")
    clock.now_s += 1
    handler_of(log).write_repeats()
    warn(log, "refused", "refused")

    assert written(log) == ["refused", "refused"]


def test_records_of_other_kinds_and_of_none_are_all_written(
    log: logging.Logger, clock: Clock
) -> None:
    for number in range(3):
        warn(log, f"refused {number}", number)
        log.warning("started")

    assert len(written(log)) == 6


def test_what_was_counted_is_written_at_the_end(log: logging.Logger, clock: Clock) -> None:
    for _ in range(3):
        warn(log, "refused", "refused")
    handler_of(log).close()

    assert written(log) == ["refused", "refused (and 1 more like this)"]


def test_a_record_that_is_kept_refers_to_no_frame(log: logging.Logger, clock: Clock) -> None:
    for _ in range(2):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            log.exception("failed", extra={REPEAT_KEY: "failed"})
    handler_of(log).close()

    lines = written(log)
    assert (lines[0], lines[-1]) == ("failed", "failed")
    stream = handler_of(log).stream
    assert isinstance(stream, io.StringIO)
    assert stream.getvalue().count("Traceback") == 1


def test_more_kinds_than_are_remembered_are_written(
    log: logging.Logger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_handler, "_KEYS_COUNT", 2)
    for _ in range(2):
        for key in range(3):
            warn(log, str(key), key)

    assert written(log) == ["0", "1", "2", "2"]


@pytest.fixture
def json_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that logs JSON, with an access log, and that is too small for `HUGE`."""
    options = ("--log-format", "json", "--access-log", "--log-level", "warning")
    limit = ("--device-memory-bytes", "8Mi")
    with server_process(tmp_path, *options, *limit) as server:
        yield server


def entries(server: ServerProcess, logger: str) -> list[dict[str, Any]]:
    lines = map(json.loads, server.log.read_text().splitlines())
    return [entry for entry in lines if entry["logger"] == logger]


def test_the_access_log_says_what_a_call_was(json_server: ServerProcess) -> None:
    with deconvd_client.connect(json_server.target, transport="unix") as F:
        F.deconvolution_2d(X, W)
        with F.using_request_id("seven"):
            y = F.deconvolution_2d(X, W)
        wait_until(lambda: "seven" in json_server.log.read_text())

    entry = entries(json_server, "deconvd_server.access")[-1]
    assert re.fullmatch(r"unix: .*", entry["peer"])
    assert entry["ms"]["server"] >= entry["ms"]["compute"] > 0
    assert entry["ms"]["queue"] == 0
    expected = {
        "method": "Deconvolve",
        "transport": "unix",
        "identity": "",
        "request_id": "seven",
        "status": "OK",
        "received_bytes": X.nbytes + W.nbytes,
        "sent_bytes": y.nbytes,
        "x": [1, 1, 4, 4],
        "w": [1, 1, 2, 2],
        "y": [1, 1, 5, 5],
        "level": "info",
    }
    assert {name: entry[name] for name in expected} == expected


def test_equal_failures_of_a_flood_are_not_a_line_each(json_server: ServerProcess) -> None:
    count = 40
    name = "deconvd_server.transports.observers"
    with deconvd_client.connect(json_server.target, transport="unix") as F:
        for _ in range(count):
            with pytest.raises(deconvd_client.ExhaustedError):
                F.deconvolution_2d(HUGE, W)

    wait_until(lambda: repeats_count(json_server, name) == count)
    failures = entries(json_server, name)
    assert len(failures) < count
    assert {entry["status"] for entry in failures} == {"RESOURCE_EXHAUSTED"}


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that logs JSON, with an access log, and knows callers by tokens."""
    tokens = write_tokens(tmp_path / "tokens", {TOKEN: "alice"})
    options = ("--log-format", "json", "--access-log", "--tokens", str(tokens))
    with server_process(tmp_path, *options, listen=("unix", "127.0.0.1:0")) as server:
        yield server


@pytest.mark.parametrize("transport", ["unix", "grpc"])
@pytest.mark.parametrize(("token", "identity"), [(TOKEN, "alice"), (None, "")])
def test_the_access_log_says_who_called(
    guarded_server: ServerProcess, transport: TransportName, token: str | None, identity: str
) -> None:
    with deconvd_client.connect(guarded_server.target, transport=transport, token=token) as F:
        name = f"{transport}-{identity}"  # others call the same server
        with F.using_request_id(name):
            F.deconvolution_2d(X, W)
        wait_until(lambda: name in guarded_server.log.read_text())

    (entry,) = [
        entry
        for entry in entries(guarded_server, "deconvd_server.access")
        if entry["request_id"] == name
    ]
    assert (entry["transport"], entry["identity"]) == (transport, identity)
    caller = f" by {identity}" if identity else ""
    assert entry["message"].startswith(f"Deconvolve {transport}{caller} from {entry['peer']} (")


def test_calls_of_strangers_are_not_a_line_each(guarded_server: ServerProcess) -> None:
    count = 40
    name = "deconvd_server.transports.grpc.callers"
    with grpc.insecure_channel(guarded_server.targets[1]) as channel:
        for number in range(count):
            call: Any = channel.unary_unary(f"/service/{number}")
            with pytest.raises(grpc.RpcError, match="must know who calls"):
                call(b"")

    wait_until(lambda: repeats_count(guarded_server, name) == count)
    refusals = entries(guarded_server, name)
    assert len(refusals) < count
    assert refusals[0]["method"] == "/service/0"
    assert {refusal["status"] for refusal in refusals} == {"UNAUTHENTICATED"}


def test_what_borrowers_of_memory_do_wrong_is_not_a_line_each(tmp_path: Path) -> None:
    count = 40
    name = "deconvd_server.shared_memory.lender"
    with server_process(tmp_path, "--log-format", "json") as server:
        path = f"{server.target.removeprefix('unix:')}.memory"
        for _ in range(count):
            with connect_unix(path, socket.SOCK_SEQPACKET) as borrower:
                borrower.send(b"no request")
                borrower.recv(100)
        wait_until(lambda: repeats_count(server, name) == count)

        assert len(entries(server, name)) < count


def test_places_that_peers_take_from_each_other_are_not_a_line_each(tmp_path: Path) -> None:
    count, places_count = 40, 8
    constants = {
        "deconvd_server.transports.direct.server:_CONNECTIONS_COUNT": places_count,
        "deconvd_server.transports.direct.server:_RESERVED_CONNECTIONS_COUNT": 0,
    }
    name = "deconvd_server.resources.fair_shares"
    with (
        server_process(tmp_path, "--log-format", "json", constants=constants) as server,
        ExitStack() as stack,
    ):
        for _ in range(places_count + count):
            stack.enter_context(open_stream(server))
        wait_until(lambda: repeats_count(server, name) == count)

        assert len(entries(server, name)) < count


def repeats_count(server: ServerProcess, logger: str) -> int:
    """Return how many messages a logger has had, with those that were only counted."""
    return sum(1 + entry.get("repeats", 0) for entry in entries(server, logger))


def test_there_is_no_access_log_unless_it_is_asked_for(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target, transport="grpc") as F:
        F.deconvolution_2d(X, W)

    assert "deconvd_server.access" not in server.log.read_text()


def test_a_reader_that_stands_still_costs_messages_and_no_calls(socket_directory: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2 * select.PIPE_BUF)
    target = f"unix:{socket_directory}/deconvd.sock"
    words = ["--device", "cpu", "--listen", target, "--access-log", "--log-format", "json"]
    with (
        os.fdopen(reading) as log_file,
        subprocess.Popen(
            [sys.executable, "-m", "deconvd_server", *words],
            stdout=subprocess.PIPE,
            stderr=writing,
            text=True,
        ) as process,
        deconvd_client.connect(target) as F,
    ):
        os.close(writing)
        try:
            assert process.stdout is not None
            assert target in process.stdout.readline()
            for _ in range(100):
                F.deconvolution_2d(X, W)
            messages = (json.loads(line)["message"] for line in log_file)
            told = next(message for message in messages if "messages were lost" in message)
            for _ in range(100):
                F.deconvolution_2d(X, W)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()

    assert re.fullmatch(r"\d+ messages were lost: nobody read standard error", told)


def test_a_line_that_was_cut_is_followed_by_one_of_its_own() -> None:
    reading, writing = os.pipe()
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2 * select.PIPE_BUF)
    stream = LogStream(writing, "utf-8")
    try:
        stream.write("x" * 2 * size + "\n")
        stream.write("lost at once\n")
        assert stream.lost_count == 2
        assert os.read(reading, 2 * size) == b"x" * size
        stream.write("after\n")
        assert os.read(reading, size) == b"\nafter\n"
    finally:
        os.close(reading)
        os.close(writing)
