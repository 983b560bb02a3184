"""Two identities on one server, from the outside: neither sees, uses or displaces what the other has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import Answer, CallFailure, MethodCode
from deconvd.errors import DeconvdError, LostSessionError, LostTensorError, UnauthenticatedError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.server_counts import ServerCounts
from deconvd.wire.status import error_from_status
from deconvd_client import Connection
from tests.direct_calls import connect_stream_from, receive_answer, send_call
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import (
    SessionClient,
    raw_tensor,
    remember_stream,
    tensor_by_digest,
    tensor_by_handle,
)
from tests.token_calls import channel_with_token, write_tokens

ONE = np.ones((1, 1, 1, 1), np.float32)
TOKENS = {"dcd_alice": "alice", "dcd_alice_2": "alice", "dcd_bob": "bob"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that knows alice, by two tokens, and bob, and keeps 32 MiB for each of the two."""
    directory = tmp_path_factory.mktemp("server")
    tokens = write_tokens(directory / "tokens", TOKENS)
    options = "--tokens", str(tokens), "--resident-memory-bytes", "64Mi"
    with server_process(directory, *options, listen=("unix", "127.0.0.1:0")) as running:
        yield running


@pytest.fixture
def open_as(server: ServerProcess) -> Iterator[Callable[..., SessionClient]]:
    """Open a session by TCP with a token, until the test ends."""
    with ExitStack() as stack:

        def open_one(token: str, tenant_key: bytes = b"", resume: bytes = b"") -> SessionClient:
            channel = stack.enter_context(channel_with_token(server.targets[1], token))
            client = SessionClient(channel, tenant_key, resume)
            stack.callback(client.cancel)
            return client

        yield open_one


def error_text(call: Callable[..., object], *args: object) -> tuple[type[DeconvdError], str]:
    with pytest.raises(grpc.RpcError) as raised:
        call(*args)
    error = error_from_rpc(raised.value)
    return type(error), str(error)


def test_who_has_no_token_or_a_wrong_one_is_nobody(
    server: ServerProcess, open_as: Callable[..., SessionClient]
) -> None:
    for token in ("", "dcd_carol", "dcd_alice "):
        kind, text = error_text(open_as, token)
        assert kind is UnauthenticatedError
        assert "carol" not in text


def test_sessions_and_handles_of_another_identity_are_answered_as_unknown_ones(
    open_as: Callable[..., SessionClient],
) -> None:
    alice, bob = open_as("dcd_alice", b"key"), open_as("dcd_bob", b"key")
    handle = alice.put(ONE)

    def use(client: SessionClient, session: bytes, handle: bytes) -> pb.DeconvolveResponse:
        return client.stub.Deconvolve(
            pb.DeconvolveRequest(
                x=tensor_by_handle(ONE, handle), w=raw_tensor(ONE), session=session
            )
        )

    unknown_handle = error_text(use, bob, bob.session, bytes(16))
    assert unknown_handle[0] is LostTensorError
    assert error_text(use, bob, bob.session, handle) == unknown_handle
    assert error_text(bob.get, handle) == error_text(bob.get, bytes(16))
    bob.drop(handle)
    unknown_session = error_text(use, bob, bytes(16), handle)
    assert unknown_session[0] is LostSessionError
    assert error_text(use, bob, alice.session, handle) == unknown_session
    assert error_text(open_as, "dcd_bob", b"key", alice.session) == unknown_session

    again = open_as("dcd_alice_2", b"key", alice.session)
    np.testing.assert_array_equal(again.get(handle), ONE)


def test_direct_connections_find_what_their_own_identity_has_alone(
    open_as: Callable[..., SessionClient],
) -> None:
    alice, bob = open_as("dcd_alice"), open_as("dcd_bob")
    handle = alice.put(ONE)
    port = alice.info().direct_port
    with ExitStack() as stack:
        lines = {
            token: stack.enter_context(closing(connect_stream_from("127.0.0.1", port, token)))
            for token in ("dcd_alice_2", "dcd_bob")
        }

        def use(token: str, session: bytes, handle: bytes) -> Answer | Exception:
            request = pb.DeconvolveRequest(
                x=tensor_by_handle(ONE, handle), w=raw_tensor(ONE), session=session
            )
            send_call(lines[token], MethodCode.Deconvolve, request.SerializeToString())
            event = receive_answer(lines[token])
            if isinstance(event, CallFailure):
                return error_from_status(event.status)
            assert isinstance(event, Answer)
            return event

        unknown_handle = use("dcd_bob", bob.session, bytes(16))
        assert isinstance(unknown_handle, LostTensorError)
        assert str(use("dcd_bob", bob.session, handle)) == str(unknown_handle)
        unknown_session = use("dcd_bob", bytes(16), handle)
        assert isinstance(unknown_session, LostSessionError)
        assert str(use("dcd_bob", alice.session, handle)) == str(unknown_session)
        assert isinstance(use("dcd_alice_2", alice.session, handle), Answer)


def test_direct_connections_without_a_valid_token_are_closed(
    open_as: Callable[..., SessionClient],
) -> None:
    port = open_as("dcd_alice").info().direct_port

    for token in ("", "dcd_carol"):
        with pytest.raises((ConnectionBrokenError, OSError)):
            connect_stream_from("127.0.0.1", port, token)


def test_content_of_another_identity_has_to_be_sent_again(
    open_as: Callable[..., SessionClient],
) -> None:
    W = np.full((1, 1, 1, 1), 7, np.float32)
    alice, same, bob = open_as("dcd_alice"), open_as("dcd_alice_2"), open_as("dcd_bob")
    list(alice.stub.DeconvolveStream(remember_stream(alice.session, ONE, W)))

    def use(client: SessionClient, of: object) -> pb.DeconvolveResponse:
        assert isinstance(of, np.ndarray)
        return client.stub.Deconvolve(
            pb.DeconvolveRequest(x=raw_tensor(ONE), w=tensor_by_digest(of), session=client.session)
        )

    use(same, W)  # all sessions of one identity are one tenant
    unknown = error_text(use, bob, np.full_like(W, 8))
    assert error_text(use, bob, W) == unknown


def test_server_info_counts_what_the_caller_has_alone(
    open_as: Callable[..., SessionClient],
) -> None:
    alice, same, bob = open_as("dcd_alice"), open_as("dcd_alice_2"), open_as("dcd_bob")
    before = alice.resident_count()
    alice.put(ONE)

    assert alice.resident_count() == same.resident_count() == before + 1
    assert bob.resident_count() == 0
    bob.session = alice.session
    assert bob.resident_count() == 0


def test_server_info_counts_the_calls_of_the_callers_identity_alone(
    server: ServerProcess, open_as: Callable[..., SessionClient]
) -> None:
    def puts_of(client: SessionClient) -> int:
        rows = (each for each in client.info().counts.methods if each.method == "PutTensor")
        return sum(count.count for each in rows for count in each.ended)

    def computed_count(counts: pb.ServerCounts | ServerCounts) -> int:
        return sum(each.count for each in counts.stages if each.stage == "compute")

    alice, same, bob = open_as("dcd_alice"), open_as("dcd_alice_2"), open_as("dcd_bob")
    before, bobs_before = puts_of(alice), puts_of(bob)
    alice.put(ONE)
    for client in (alice, bob):
        client.stub.Deconvolve(pb.DeconvolveRequest(x=raw_tensor(ONE), w=raw_tensor(ONE)))
    wait_until(lambda: puts_of(alice) == before + 1)  # a call ends after its last byte has left

    assert puts_of(same) == before + 1
    assert puts_of(bob) == bobs_before
    with deconvd_client.connect(server.targets[0]) as operator:

        def has_sum_of_both() -> bool:
            counts = operator.server_info().counts
            assert counts is not None
            parts = [computed_count(client.info().counts) for client in (alice, bob)]
            return all(parts) and computed_count(counts) == sum(parts)

        wait_until(has_sum_of_both)


def test_no_number_of_keys_takes_more_than_an_identitys_share(
    open_as: Callable[..., SessionClient],
) -> None:
    image = np.ones((8, 1, 512, 511), np.float32)  # of 8 MiB, nearly
    bob = open_as("dcd_bob")
    handles = [bob.put(image) for _ in range(4)]
    alices = [open_as("dcd_alice", bytes([number])) for number in range(6)]
    kept = [alice.put(image) for alice in alices]

    for handle in handles:  # half of the memory is bob's
        np.testing.assert_array_equal(bob.get(handle), image)
    for alice, handle in zip(alices[:2], kept[:2], strict=True):
        assert error_text(alice.get, handle)[0] is LostTensorError
    for alice, handle in zip(alices[2:], kept[2:], strict=True):
        np.testing.assert_array_equal(alice.get(handle), image)


@pytest.mark.parametrize("way", ["grpc", "tcp"])
def test_connections_of_two_identities_compute_and_keep_beside_each_other(
    server: ServerProcess, way: str
) -> None:
    x = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)

    def connect(token: str) -> Connection:
        return deconvd_client.connect(server.targets[1], transport=way, token=token)

    with connect("dcd_alice") as alice, connect("dcd_bob") as bob:
        mine, its = alice.put(x), bob.put(2 * x)
        for F, there, expected in ((alice, mine, x), (bob, its, 2 * x)):
            np.testing.assert_array_equal(F.deconvolution_2d(there, ONE), expected)
            np.testing.assert_array_equal(there.numpy(), expected)


def test_no_token_is_in_the_log(server: ServerProcess) -> None:
    log = server.log.read_text()

    assert "Traceback" not in log
    assert [token for token in (*TOKENS, "dcd_carol") if token in log] == []
