"""Ports that tests and benchmarks choose in advance."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import ports
from benchmarks.links.delay_proxy import DelayProxy
from benchmarks.ports import free_port
from benchmarks.wire import count_traffic
from tests.direct_calls import get_server_info
from tests.servers import server_process

ANOTHER_PROCESS = """
from benchmarks import ports
ports._candidates = lambda: [%s]
try:
    print(ports.free_port())
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three free ports that nobody has been given; no others are chosen from then on."""
    few = [free_port() for _ in range(3)]
    for port in few:
        ports._given.remove(port)
    monkeypatch.setattr(ports, "_candidates", lambda: list(few))
    return few


@contextmanager
def bound(host: str, port: int) -> Iterator[None]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, port))
        yield


def test_each_is_given_once(choice: list[int]) -> None:
    assert sorted(free_port() for _ in choice) == sorted(choice)
    with pytest.raises(RuntimeError, match="no TCP port of 3 is free"):
        free_port()


def test_ports_that_follow_each_other_are_each_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port(3)
    for port in range(first, first + 3):
        ports._given.remove(port)
    monkeypatch.setattr(ports, "_candidates", lambda: [*range(first, first + 3)])
    with pytest.raises(RuntimeError):
        free_port(4)
    for port in range(first, first + 3):
        ports._given.remove(port)
    with bound("127.0.0.1", first), pytest.raises(RuntimeError):
        free_port(3)


def test_no_other_process_gets_it() -> None:
    port = free_port()
    script = ANOTHER_PROCESS % port
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert b"no TCP port of 1 is free" in ended.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_what_another_socket_has_on_any_address_is_not_free(choice: list[int], host: str) -> None:
    with bound(host, choice[0]):
        assert sorted(free_port() for _ in choice[1:]) == sorted(choice[1:])
        with pytest.raises(RuntimeError):
            free_port()


def test_the_kernel_gives_it_to_nobody() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not low <= free_port() <= high


def test_the_ports_of_a_server_are_free_on_other_addresses(tmp_path: Path) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as server:
        port = int(server.target.rpartition(":")[2])
        direct_port = get_server_info(server).direct_port
    assert {port, direct_port} <= ports._given


def test_a_proxy_that_does_not_get_its_port_closes_what_it_has(tmp_path: Path) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as server:
        direct_port = get_server_info(server).direct_port
        with bound("127.0.0.2", direct_port):  # what stayed open would be a warning, an error here
            with pytest.raises(OSError, match="in use"), count_traffic(server.target):
                pass
            with pytest.raises(OSError, match="in use"):
                DelayProxy("127.0.0.1", [free_port(), direct_port], 0)
