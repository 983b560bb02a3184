"""By what peers are counted: an address, a network, a process."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd_server.resources.peer_identity import peer_key_of_connection, peer_key_of_grpc


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:127.0.0.1:34567", "127.0.0.1"),
        ("ipv6:%5B::1%5D:34567", "::/64"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:34567", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2:ffff::%5D:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:1", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("unix:", "gRPC over Unix sockets"),
        ("unix:/run/deconvd.sock", "gRPC over Unix sockets"),
        ("unix-abstract:name", "gRPC over Unix sockets"),
        ("vsock:2:1", "vsock"),
        ("", ""),
    ],
)
def test_a_call_by_grpc_is_counted_by_its_host(text: str, peer: str) -> None:
    assert peer_key_of_grpc(text) == peer


@given(st.text())
def test_whatever_grpc_says_of_a_peer_is_something_to_count_by(text: str) -> None:
    assert isinstance(peer_key_of_grpc(text), str)


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_a_tcp_connection_is_counted_by_its_address_as_calls_by_grpc_from_there_are(
    source: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), source_address=(source, 0))
        connection, address = listener.accept()
        with client, connection:
            assert peer_key_of_connection(connection, address) == source
            assert peer_key_of_grpc(f"ipv4:{address[0]}:{address[1]}") == source


def test_a_connection_of_ipv4_to_a_socket_for_both_is_counted_as_any_of_ipv4() -> None:
    address = ("::ffff:127.0.0.2", 34567, 0, 0)
    with socket.socket(socket.AF_INET6) as connection:
        assert peer_key_of_connection(connection, address) == "127.0.0.2"


def test_a_unix_connection_is_counted_by_its_process() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_key_of_connection(one, "") == f"process {os.getpid()}"
