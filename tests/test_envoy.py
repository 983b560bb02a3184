"""Behind a proxy, a real Envoy, all calls are gRPC's, and all of them work."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection, InvalidArgumentError
from tests.envoys import run_envoy
from tests.servers import ServerProcess, free_port, server_process

pytest.importorskip("envoy", reason="there is no Envoy for this system")

HOST = "127.0.0.2"  # where the server's own ports are not to be had, as on another host
TWICE = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    with server_process(directory, "--log-level", "debug", listen=("127.0.0.1:0",)) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Envoy before the server, as a target."""
    port = free_port()
    config = tmp_path_factory.mktemp("envoy") / "envoy.json"
    config.write_text(json.dumps(configuration(port, int(server.target.rpartition(":")[2]))))
    with run_envoy(config, HOST, port) as target:
        yield target


def configuration(port: int, server_port: int) -> dict[str, object]:
    """Return the settings of an Envoy that hands all of HTTP/2 on, as one for gRPC has them."""
    extensions = "type.googleapis.com/envoy.extensions"
    connections = {
        "@type": f"{extensions}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP2",
        "stat_prefix": "deconvd",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "server", "timeout": "0s"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{extensions}.filters.http.router.v3.Router"},
            }
        ],
    }
    manager = "envoy.filters.network.http_connection_manager"
    listener = {
        "address": address(HOST, port),
        "filter_chains": [{"filters": [{"name": manager, "typed_config": connections}]}],
    }
    protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {"endpoint": {"address": address("127.0.0.1", server_port)}}
    cluster = {
        "name": "server",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            protocol: {
                "@type": f"type.googleapis.com/{protocol}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def address(host: str, port: int) -> dict[str, object]:
    return {"socket_address": {"address": host, "port_value": port}}


@pytest.fixture(params=["auto", "tcp", "grpc"])
def through(request: pytest.FixtureRequest, proxy: str) -> Iterator[Connection]:
    """A connection through the proxy, by each way that may lead there."""
    with deconvd_client.connect(proxy, transport=request.param) as connection:
        yield connection


@pytest.mark.parametrize("n", [1, 64], ids=["message", "stream"])
def test_tensors_of_any_size_go_through_a_proxy(through: Connection, n: int) -> None:
    x = np.random.default_rng(0).standard_normal((n, 2, 128, 256)).astype(np.float32)

    y = through.deconvolution_2d(x, TWICE)
    gx, gW, gb = through.deconvolution_2d_grad(x, TWICE, None, y)

    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(gx, 2 * y)
    assert gW is not None
    assert gb is None


def test_tensors_stay_behind_a_proxy(through: Connection) -> None:
    x = np.random.default_rng(0).standard_normal((64, 2, 128, 128)).astype(np.float32)

    there = through.put(x)
    y, pullback = through.vjp(there, TWICE)

    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(pullback(y).gx, 4 * x)
    np.testing.assert_array_equal(there.numpy(), x)


def test_errors_come_through_a_proxy_as_they_were(through: Connection) -> None:
    x = np.ones((1, 2, 8, 8), np.float32)
    with pytest.raises(InvalidArgumentError, match="outsize"):
        through.deconvolution_2d(x, TWICE, outsize=(100, 100))
    assert through.health() == "SERVING"


def test_all_of_it_was_grpc(through: Connection, server: ServerProcess) -> None:
    through.deconvolution_2d(np.ones((1, 2, 8, 8), np.float32), TWICE)

    log = server.log.read_text()
    assert "Deconvolve from ipv4:127.0.0.1" in log
    assert "Deconvolve from tcp:" not in log
