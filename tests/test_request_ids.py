"""Request ids: clients set them, and find them in errors and in the server's log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import InvalidArgumentError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1.deconvd_pb2_grpc import DeconvolutionServiceStub
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.tensor import message_from_array
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process

X = np.ones((1, 1, 4, 4), np.float32)
W = np.ones((1, 1, 2, 2), np.float32)
HUGE = np.broadcast_to(np.float32(0), (1, 1, 1 << 12, 1 << 12))
"""An x of 64 MiB."""

WAYS = ["grpc", "unix", "shared_memory"]


@pytest.fixture(scope="module")
def logging_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with an access log, that is too small for `HUGE`."""
    options = ("--access-log", "--device-memory-bytes", "8Mi")
    with server_process(tmp_path_factory.mktemp("server"), *options) as server:
        yield server


def lines_with(server: ServerProcess, text: str) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if text in line]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("is_stream", [False, True], ids=["message", "stream"])
def test_the_log_of_a_call_has_the_id_that_its_client_set(
    logging_server: ServerProcess,
    transport: str,
    is_stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_stream:
        monkeypatch.setattr("deconvd_client.dispatch._MAX_BRIEF_BYTES", 0)
        monkeypatch.setattr("deconvd_client.dispatch._MAX_UNARY_BYTES", 0)
    request_id = f"{transport}-{is_stream}"
    with deconvd_client.connect(logging_server.target, transport=transport) as F:
        before = F.deconvolution_2d(X, W)
        with F.using_request_id(request_id):
            named = F.deconvolution_2d(X, W)
        F.deconvolution_2d(X, W)
        wait_until(lambda: bool(lines_with(logging_server, request_id)))

    (line,) = lines_with(logging_server, f"(request {request_id})")
    assert " OK x=" in line
    np.testing.assert_array_equal(named, before)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("transport", WAYS)
def test_an_error_has_the_id_that_its_client_set(
    logging_server: ServerProcess, transport: str
) -> None:
    with (
        deconvd_client.connect(logging_server.target, transport=transport) as F,
        F.using_request_id("too large"),
        pytest.raises(deconvd_client.ExhaustedError) as caught,
    ):
        F.deconvolution_2d(HUGE, W)

    assert caught.value.request_id == "too large"


def test_a_failed_call_without_an_id_gets_one_by_which_the_log_can_be_searched(
    logging_server: ServerProcess,
) -> None:
    with (
        deconvd_client.connect(logging_server.target, transport="grpc") as F,
        pytest.raises(deconvd_client.ExhaustedError) as caught,
    ):
        F.deconvolution_2d(HUGE, W)

    request_id = caught.value.request_id
    assert request_id
    wait_until(lambda: bool(lines_with(logging_server, f"(request {request_id})")))


def call_by_grpc(
    server: ServerProcess, request: pb.DeconvolveRequest, metadata: str
) -> InvalidArgumentError:
    with grpc.insecure_channel(server.target) as channel:
        stub = DeconvolutionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Deconvolve(request, metadata=(("x-request-id", metadata),))
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidArgumentError)
    return error


def test_metadata_of_grpc_may_have_the_id_even_of_a_request_that_is_not_valid(
    logging_server: ServerProcess,
) -> None:
    assert (
        call_by_grpc(logging_server, pb.DeconvolveRequest(), "of a proxy").request_id
        == "of a proxy"
    )


def test_the_requests_own_id_is_returned_if_a_proxy_sets_another(
    logging_server: ServerProcess,
) -> None:
    request = pb.DeconvolveRequest(
        x=message_from_array(X), telemetry=pb.Telemetry(request_id="my own")
    )

    assert call_by_grpc(logging_server, request, "of a proxy").request_id == "my own"


def test_an_id_is_cut_and_escaped_before_it_is_logged(logging_server: ServerProcess) -> None:
    forged = "\nERROR deconvd_server: forged\u202e" + 4096 * "A"
    request = pb.DeconvolveRequest(telemetry=pb.Telemetry(request_id=forged))

    request_id = call_by_grpc(logging_server, request, "x").request_id

    assert len(request_id) == 128
    assert request_id.startswith(r"\nERROR deconvd_server: forged\u202eAAA")
    wait_until(lambda: bool(lines_with(logging_server, request_id)))
    assert not [line for line in lines_with(logging_server, "forged") if line.startswith("ERROR")]


@pytest.mark.parametrize("given", ["", "a\nb", "é", 129 * "a", 5])
def test_an_id_that_no_log_can_hold_is_refused(F: deconvd_client.Connection, given: str) -> None:
    with pytest.raises(InvalidArgumentError, match="request_id must be 1 to 128"):
        with F.using_request_id(given):
            raise AssertionError


def test_ids_apply_to_calls_in_the_background(logging_server: ServerProcess) -> None:
    with deconvd_client.connect(logging_server.target, transport="grpc") as F:
        with F.using_request_id("in the background"):
            future = F.submit(F.deconvolution_2d, X, W)
        future.result()
        wait_until(lambda: bool(lines_with(logging_server, "in the background")))


def test_the_request_that_calls_share_stays_as_it_was(tmp_path: Path) -> None:
    with (
        server_process(tmp_path, "--access-log") as server,
        deconvd_client.connect(server.target, transport="grpc") as F,
    ):
        F.deconvolution_2d(X, W)
        with F.using_request_id("once"):
            F.deconvolution_2d(X, W)
        for _ in range(3):
            F.deconvolution_2d(X, W)
        wait_until(lambda: len(lines_with(server, ": Deconvolve grpc")) == 5)

    assert len(lines_with(server, "(request once)")) == 1
    assert len(lines_with(server, "(request -)")) >= 4
