"""Addresses: which there are, what becomes of a Unix socket's file, and who gets one that two servers want."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from deconvd.errors import InvalidArgumentError
from deconvd_server.resources.socket_file import Access, AddressInUseError
from deconvd_server.transports.listen import bind, release

MakeServer = Callable[[], grpc.Server]


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """A function that makes a gRPC server that has one method, /test/Echo, and shares no port."""

    def handler() -> grpc.GenericRpcHandler:
        echo: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            lambda request, context: request
        )
        return grpc.method_handlers_generic_handler("test", {"Echo": echo})

    with ExitStack() as stack:

        def make() -> grpc.Server:
            handlers = stack.enter_context(ThreadPoolExecutor(1))
            server = grpc.server(handlers, options=[("grpc.so_reuseport", 0)])
            server.add_generic_rpc_handlers((handler(),))
            stack.callback(lambda: server.stop(None).wait())
            return server

        yield make


def answers(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        echo: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Echo")
        try:
            return echo(b"hello", timeout=30) == b"hello"
        except grpc.RpcError:
            return False


def leave_dead_socket(path: Path) -> None:
    """Leave what a killed server leaves: a socket's file that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    assert path.is_socket()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::]"])
def test_port_0_gets_a_free_port_that_is_told_and_answers(
    make_server: MakeServer, host: str
) -> None:
    server = make_server()

    address = bind(server, f"{host}:0")
    server.start()

    name, _, port = address.rpartition(":")
    assert name == host
    assert int(port) > 0
    assert answers(address)


@pytest.mark.parametrize("scheme", ["unix:", "unix://"])
def test_a_unix_socket_answers_at_its_own_address(
    make_server: MakeServer, socket_directory: Path, scheme: str
) -> None:
    server, wanted = make_server(), f"{scheme}{socket_directory}/a socket's näme"

    address = bind(server, wanted)
    server.start()

    assert address == wanted
    assert os.listdir(socket_directory) == ["a socket's näme"]
    assert answers(address)


def test_a_unix_path_may_be_relative(
    make_server: MakeServer, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(socket_directory)
    server = make_server()

    address = bind(server, "unix:deconvd.sock")
    server.start()

    assert (socket_directory / "deconvd.sock").is_socket()
    assert answers(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "localhost",
            ":50051",
            "::1:50051",
            "[::1]",
            "localhost:http",
            "localhost:\N{ARABIC-INDIC DIGIT FIVE}",
        ),
        *("localhost:-1", "http://localhost:1", "dns:localhost:1", "localhost:1\n", "a/b:1"),
    ],
)
def test_what_is_no_address_is_refused_as_given(make_server: MakeServer, address: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        bind(make_server(), address)

    assert str(raised.value) == f"--listen must be host:port or unix:path, got {address!r}"
    assert raised.value.argument == "listen"


@pytest.mark.parametrize("port", ["65536", "70000", "9" * 5000])
def test_a_port_must_be_one_that_there_is(make_server: MakeServer, port: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match="--listen must have a port from 0 to 65535, got"
    ):
        bind(make_server(), f"localhost:{port}")


def test_a_unix_path_that_clients_could_not_name_alike_is_refused(
    make_server: MakeServer, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(socket_directory)

    with pytest.raises(InvalidArgumentError, match="by a path that begins with / after unix://"):
        bind(make_server(), "unix://deconvd.sock")

    assert os.listdir(socket_directory) == []


@pytest.mark.parametrize("path", ["", "///", "/tmp/" + "x" * 103, "/tmp/" + "ü" * 52])
def test_a_unix_path_too_short_or_long_is_refused(make_server: MakeServer, path: str) -> None:
    with pytest.raises(InvalidArgumentError, match="a Unix socket of 1 to 107 bytes, got 'unix:"):
        bind(make_server(), f"unix:{path}")


def test_a_unix_path_of_the_greatest_length_answers(
    make_server: MakeServer, socket_directory: Path
) -> None:
    server = make_server()
    path = f"{socket_directory}/".ljust(107, "x")

    address = bind(server, f"unix:{path}")
    server.start()

    assert answers(address)


@pytest.mark.parametrize("letter", ["%", "?", "#", ","])
def test_a_unix_path_that_grpc_would_take_for_another_is_refused(
    make_server: MakeServer, socket_directory: Path, letter: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"without the letters %, \?, # and the comma"):
        bind(make_server(), f"unix:{socket_directory}/a{letter}41")

    assert os.listdir(socket_directory) == []


def test_a_unix_path_in_no_directory_is_refused(
    make_server: MakeServer, socket_directory: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match="in a directory that exists, got"):
        bind(make_server(), f"unix:{socket_directory}/missing/deconvd.sock")


def test_a_host_that_is_not_here_is_not_bound(make_server: MakeServer) -> None:
    with pytest.raises(AddressInUseError, match=r"in use or not of this host: '192.0.2.1:0'"):
        bind(make_server(), "192.0.2.1:0")


def test_a_port_in_use_is_not_shared(make_server: MakeServer) -> None:
    first = make_server()
    address = bind(first, "127.0.0.1:0")
    first.start()

    with pytest.raises(AddressInUseError, match="the address is in use"):
        bind(make_server(), address)

    assert answers(address)


def test_the_socket_of_a_dead_server_is_taken_over(
    make_server: MakeServer, socket_directory: Path
) -> None:
    server, path = make_server(), socket_directory / "deconvd.sock"
    leave_dead_socket(path)

    address = bind(server, f"unix:{path}")
    server.start()

    assert answers(address)


def test_the_socket_of_a_live_server_is_left_to_it(
    make_server: MakeServer, socket_directory: Path
) -> None:
    first, address = make_server(), f"unix:{socket_directory}/deconvd.sock"
    bind(first, address)
    first.start()

    with pytest.raises(AddressInUseError, match="a live server listens there"):
        bind(make_server(), address)

    assert answers(address)


@pytest.mark.parametrize("kind", ["file", "directory", "pipe", "link to a file"])
def test_what_is_not_a_socket_is_left_as_it_is(
    make_server: MakeServer, socket_directory: Path, kind: str
) -> None:
    path, target = socket_directory / "deconvd.sock", socket_directory / "target"
    target.write_text("precious")
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_text("precious"),
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link to a file": lambda: path.symlink_to(target),
    }
    make[kind]()
    before = path.lstat()

    with pytest.raises(AddressInUseError, match="the file is not a socket"):
        bind(make_server(), f"unix:{path}")

    assert path.lstat().st_ino == before.st_ino
    assert target.read_text() == "precious"
    if kind == "file":
        assert path.read_text() == "precious"


@pytest.mark.parametrize("leftover", [False, True], ids=["new", "left over"])
def test_of_servers_that_race_for_a_socket_one_gets_it_and_answers(
    make_server: MakeServer, socket_directory: Path, leftover: bool
) -> None:
    path, racers_count = socket_directory / "deconvd.sock", 4
    if leftover:
        leave_dead_socket(path)
    servers, start = [make_server() for _ in range(racers_count)], threading.Barrier(racers_count)

    def race(server: grpc.Server) -> bool:
        start.wait(30)
        try:
            bind(server, f"unix:{path}")
        except AddressInUseError:
            return False
        server.start()
        return True

    with ThreadPoolExecutor(racers_count) as pool:
        got_it = list(pool.map(race, servers))

    assert sorted(got_it) == [False, False, False, True]
    assert answers(f"unix:{path}")


def test_a_server_waits_while_another_of_the_same_user_is_at_the_same_socket(
    make_server: MakeServer, socket_directory: Path
) -> None:
    server, lock = make_server(), socket_directory / ".deconvd.sock.lock"
    other = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)

    with ThreadPoolExecutor(1) as pool:
        bound = pool.submit(bind, server, f"unix:{socket_directory}/deconvd.sock")
        time.sleep(0.5)  # many of its attempts to lock
        assert not bound.done()
        assert os.listdir(socket_directory) == [lock.name]
        os.close(other)
        bound.result(30)

    assert os.listdir(socket_directory) == ["deconvd.sock"]


def test_a_lock_that_is_never_left_is_said(
    make_server: MakeServer, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_server.resources.socket_lock._LOCK_S", 1.0)
    other = os.open(socket_directory / ".deconvd.sock.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)

    with pytest.raises(AddressInUseError, match="another server has been starting or ending there"):
        bind(make_server(), f"unix:{socket_directory}/deconvd.sock")

    os.close(other)


@pytest.mark.parametrize("type_", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_live_server_that_takes_no_connections_does_not_hold_up_another(
    make_server: MakeServer, socket_directory: Path, type_: socket.SocketKind
) -> None:
    path = str(socket_directory / "deconvd.sock")
    with socket.socket(socket.AF_UNIX, type_) as full, socket.socket(socket.AF_UNIX, type_) as one:
        full.bind(path)
        full.listen(0)
        one.connect(path)

        with pytest.raises(AddressInUseError, match="a live server listens there"):
            bind(make_server(), f"unix:{path}")


def test_a_link_to_nothing_is_left_as_it_is(
    make_server: MakeServer, socket_directory: Path
) -> None:
    path = socket_directory / "deconvd.sock"
    path.symlink_to("nowhere")

    with pytest.raises(AddressInUseError, match="the file is not a socket"):
        bind(make_server(), f"unix:{path}")

    assert path.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_has_the_mode_and_group_that_it_is_given(
    make_server: MakeServer, socket_directory: Path, mode: int
) -> None:
    server, path = make_server(), socket_directory / "deconvd.sock"

    bind(server, f"unix:{path}", Access(mode, os.getgid()))
    server.start()

    assert path.stat().st_mode & 0o777 == mode
    assert path.stat().st_gid == os.getgid()
    assert answers(f"unix:{path}")


def test_release_removes_the_socket_of_a_stopped_server(
    make_server: MakeServer, socket_directory: Path
) -> None:
    server = make_server()
    address = bind(server, f"unix:{socket_directory}/deconvd.sock")
    server.start()
    server.stop(None).wait()

    release(address)
    release(address)

    assert os.listdir(socket_directory) == []


def test_release_leaves_the_socket_to_a_successor(
    make_server: MakeServer, socket_directory: Path
) -> None:
    first, second = make_server(), make_server()
    address = bind(first, f"unix:{socket_directory}/deconvd.sock")
    first.start()
    first.stop(None).wait()
    bind(second, address)
    second.start()

    release(address)

    assert answers(address)


def test_release_of_a_socket_whose_directory_has_gone_is_harmless(
    make_server: MakeServer, socket_directory: Path
) -> None:
    server, directory = make_server(), socket_directory / "run"
    directory.mkdir()
    address = bind(server, f"unix:{directory}/deconvd.sock")
    server.start()
    server.stop(None).wait()
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()

    release(address)


def test_release_of_a_port_does_nothing(make_server: MakeServer) -> None:
    server = make_server()
    address = bind(server, "127.0.0.1:0")
    server.start()

    release(address)

    assert answers(address)
