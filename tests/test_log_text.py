"""What clients send gets into the log as a part of a line, escaped and cut, and never as a line of its own."""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import Answer, CallFailure, FrameKind, MessagePart, MethodCode
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.tensor import message_from_array
from deconvd_server.log_text import FIELDS, REPEATS, JsonLogFormatter, LogFormatter, excerpt
from tests.direct_calls import REQUEST, X, get_server_info, is_serving, open_stream, send_call
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import send_raw

FORGED = "\nERROR deconvd_server: a device is lost\x1b[2J\u202e" + 4096 * "A"
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: .+")
LONGEST_LINE = 500
LONGEST_FIRST_LINE = 1000
"""The longest that says what serves where: it has the paths of a test's folder."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose log must have nothing but records at its end, on lines of moderate length."""
    with server_process(tmp_path, "--log-level", "debug", listen=("unix", "127.0.0.1:0")) as server:
        yield server
        lines = server.log.read_text().splitlines()
    assert lines
    for line in lines:
        assert RECORD.fullmatch(line), line
        assert line.isprintable()
        is_first = " deconvd_server: deconvd " in line and " serves on " in line
        assert len(line) < (LONGEST_FIRST_LINE if is_first else LONGEST_LINE)


def stream_header() -> bytes:
    request = pb.DeconvolveRequest()
    request.CopyFrom(REQUEST)
    for tensor in (request.x, request.w):
        tensor.ClearField("raw")
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
    return pb.DeconvolveStreamRequest(header=header).SerializeToString()


def put_header() -> bytes:
    header = pb.PutTensorHeader(tensor=message_from_array(X))
    header.tensor.ClearField("raw")
    return pb.PutTensorRequest(header=header).SerializeToString()


SERVERS_FRAMES = {
    FrameKind.FAILED: CallFailure(status_pb2.Status(code=2, message=FORGED)).pack(),
    FrameKind.ANSWER: Answer(FORGED.encode(), "").pack(),
    FrameKind.MESSAGE: MessagePart(stream_header()).pack(),
}


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("kind", SERVERS_FRAMES)
def test_a_frame_that_only_servers_send_breaks_a_clients_line_and_says_nothing(
    running: ServerProcess, kind: FrameKind, transport: str
) -> None:
    line = open_stream(running, transport)
    line.set_deadline(30)
    send_call(line, MethodCode.DeconvolveStream, stream_header())
    send_raw(line, SERVERS_FRAMES[kind])

    with suppress(ConnectionBrokenError):
        while True:
            line.next_event()
    line.close()

    wait_until(
        lambda: bool(
            re.search(
                f"{kind.name} with a payload of .* where the client may", running.log.read_text()
            )
        )
    )
    assert "a device is lost" not in running.log.read_text()


@pytest.mark.parametrize("kind", [FrameKind.FAILED, FrameKind.ANSWER, FrameKind.MESSAGE])
def test_such_a_frame_where_a_call_was_to_begin_says_nothing_either(
    running: ServerProcess, kind: FrameKind
) -> None:
    line = open_stream(running)
    line.set_deadline(30)
    send_raw(line, SERVERS_FRAMES[kind])

    with pytest.raises(ConnectionBrokenError):
        line.next_event()

    line.close()
    other = open_stream(running)
    assert is_serving(other)
    other.close()
    assert "a device is lost" not in running.log.read_text()


def test_an_argument_of_any_length_is_cut(running: ServerProcess) -> None:
    request = pb.DeconvolveRequest(x=pb.Tensor(shape=[1] * 100_000, raw=b"1234"))
    with grpc.insecure_channel(running.target) as channel:
        with pytest.raises(grpc.RpcError):
            pb_grpc.DeconvolutionServiceStub(channel).Deconvolve(request, timeout=30)

    assert "INVALID_ARGUMENT: " in running.log.read_text()


def asks_for(symbol: str) -> bytes:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    return request.SerializeToString()


def test_text_in_requests_paths_and_metadata_is_not_repeated(running: ServerProcess) -> None:
    forged = FORGED.encode()
    metadata = (("x-note-bin", forged), ("user-agent", "ERROR a device is lost"))
    messages: dict[str, bytes | Message] = {
        "/ERROR a device is lost": forged,
        "/deconvd.v1.DeconvolutionService/ERROR%0AERROR": forged,
        "/deconvd.v1.DeconvolutionService/GetServerInfo": forged,
        "/deconvd.v1.DeconvolutionService/DropTensors": pb.DropTensorsRequest(session=forged),
        "/deconvd.v1.DeconvolutionService/Deconvolve": pb.DeconvolveRequest(session=forged),
        "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service=FORGED),
    }
    with grpc.insecure_channel(running.target) as channel:
        for path, message in messages.items():
            data = message if isinstance(message, bytes) else message.SerializeToString()
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            with pytest.raises(grpc.RpcError):
                call(data, timeout=30, metadata=metadata)
        reflection: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        for _ in reflection(iter([asks_for(FORGED[:1024])]), timeout=30):
            pass
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):  # it is too long
            list(reflection(iter([asks_for(FORGED)]), timeout=30))

    assert "a device is lost" not in running.log.read_text()


def test_packets_at_the_memorys_socket_are_not_repeated(running: ServerProcess) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(get_server_info(running).shared_memory_socket)
        stranger.send(FORGED.encode())
        assert stranger.recv(1024)

    assert "sent a malformed request for shared memory" in running.log.read_text()
    assert "a device is lost" not in running.log.read_text()


def test_an_excerpt_is_one_printable_line_of_moderate_length() -> None:
    text = excerpt(ValueError(FORGED))

    assert text.startswith(r"\nERROR deconvd_server: a device is lost\x1b[2J\u202eAAA")
    assert text.isprintable()
    assert len(text) <= 201
    assert excerpt("Gerät „ü“ is busy") == "Gerät „ü“ is busy"


def test_an_excerpt_has_two_hundred_letters_and_says_if_there_are_more() -> None:
    assert excerpt("x" * 200) == "x" * 200
    assert excerpt("x" * 201) == "x" * 200 + "…"
    assert excerpt("\n" * 150) == r"\n" * 100 + "…"  # as they are printed


def test_whoever_logs_a_text_of_many_lines_logs_one_record() -> None:
    try:
        raise RuntimeError(f"\udcff{FORGED}")
    except RuntimeError:
        record = logging.LogRecord("n", logging.ERROR, "", 0, FORGED, (), sys.exc_info())

    first, *others = LogFormatter().format(record).splitlines()

    assert RECORD.fullmatch(first)
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert r"RuntimeError: \udcff" in others[-2]
    assert "    ERROR deconvd_server: a device is lost" in others[-1]


@pytest.mark.parametrize("formatter", [LogFormatter(), JsonLogFormatter()])
def test_metadata_that_is_not_utf8_makes_one_line_that_quotes_nothing(
    formatter: logging.Formatter,
) -> None:
    metadata = b"Bearer dcd_a-good-token\xeb" + bytes(range(200))
    try:
        metadata.decode()
    except UnicodeDecodeError:
        arguments = ("Invalid encoding on %s", (metadata,), sys.exc_info())
        record = logging.LogRecord("grpc._cython.cygrpc", logging.ERROR, "", 0, *arguments)

    (line,) = formatter.format(record).splitlines()

    assert "a call's metadata has 224 bytes that are not UTF-8" in line
    assert "dcd_" not in line
    assert record.exc_info  # which other handlers may want


@pytest.mark.parametrize(
    ("logger", "error"),
    [
        ("grpc._cython.cygrpc", ZeroDivisionError("an error")),
        ("deconvd_server", UnicodeDecodeError("utf-8", b"a file", 0, 1, "an error")),
    ],
)
def test_other_errors_are_quoted_whole(logger: str, error: Exception) -> None:
    exc_info = (type(error), error, None)
    record = logging.makeLogRecord({"name": logger, "msg": "failed", "exc_info": exc_info})

    head, *_, last = LogFormatter().format(record).splitlines()

    assert head.endswith(f"{logger}: failed")
    assert last == f"    {type(error).__name__}: {error}"


def as_json(**attributes: object) -> str:
    record = logging.makeLogRecord({"name": "a", "levelname": "INFO", **attributes})
    return JsonLogFormatter().format(record)


def test_json_is_one_line_whatever_a_text_contains() -> None:
    line = as_json(msg="%s", args=('"},\n{"level": "error\u2028\x1b[2J',), created=0.25, msecs=250)

    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "a",
        "message": '"},\n{"level": "error\u2028\x1b[2J',
    }


def test_json_has_the_fields_of_a_record_and_its_traceback() -> None:
    try:
        raise ZeroDivisionError("a\nb")
    except ZeroDivisionError as error:
        exc_info = (type(error), error, error.__traceback__)
    entry = json.loads(as_json(msg="failed", exc_info=exc_info, **{FIELDS: {"status": "OK"}}))

    assert entry["status"] == "OK"
    assert entry["traceback"].endswith("ZeroDivisionError: a\nb")


@pytest.mark.parametrize(("count", "more"), [(0, ""), (1, " (and 1 more like this)")])
def test_a_record_says_how_many_like_it_were_left_out(count: int, more: str) -> None:
    attributes = {"name": "a", "levelname": "INFO", "msg": "refused", REPEATS: count}

    assert LogFormatter().format(logging.makeLogRecord(attributes)).endswith(f"a: refused{more}")
    assert json.loads(as_json(**attributes)).get("repeats", 0) == count


def test_a_record_that_does_not_repeat_does_not_say_so() -> None:
    assert LogFormatter().format(logging.makeLogRecord({"msg": "started"})).endswith(": started")
    assert json.loads(as_json(msg="started")).keys() == {"time", "level", "logger", "message"}
