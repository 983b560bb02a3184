"""A client in another language needs the .proto and nothing else of ours."""

from __future__ import annotations

from pathlib import Path

from tests.javascript import NPM_DIRECTORY, node
from tests.servers import server_process

_PROTO = Path(__file__).parents[1] / "proto"


def test_a_node_client_computes_with_the_proto_alone(tmp_path: Path) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as server:
        ended = node(NPM_DIRECTORY / "client.mjs", server.target, _PROTO)

    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("agrees with") == 5


def test_the_node_client_fails_without_a_server(tmp_path: Path) -> None:
    ended = node(NPM_DIRECTORY / "client.mjs", f"unix:{tmp_path}/nobody.sock", _PROTO)

    assert ended.returncode == 1
    assert "UNAVAILABLE" in ended.stdout
