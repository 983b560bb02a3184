"""Three real servers behind a real Envoy that hashes the header of our calls: they lose no call either."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection, InvalidArgumentError
from tests.envoys import run_documented_envoy
from tests.fleets import (
    FILTERS,
    HOSTS,
    LARGE,
    TWO,
    Fleet,
    X,
    check_stickiness,
    lose_no_call,
    middle_server,
    places_of_filters,
    restart_all,
    running_fleet,
    wait_until_used,
)
from tests.processes import wait_until
from tests.servers import stop_server

pytest.importorskip("envoy", reason="there is no Envoy for this system")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def proxy(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The target of an Envoy that runs with the file of the documents."""
    endpoint = (
        "- endpoint: { address: { socket_address: { address: deconvd, port_value: 50051 } } }"
    )
    # what is hashed of a server is its address, unless it has a key, which is the same in each run
    keyed = endpoint + "\n%s  metadata: { filter_metadata: { envoy.lb: { hash_key: deconvd } } }"
    endpoints = [
        (keyed % (" " * 14)).replace("deconvd", host).replace("50051", str(fleet.port))
        for host in HOSTS
    ]
    replacements = {"STRICT_DNS": "STATIC", endpoint: f"\n{' ' * 14}".join(endpoints)}
    directory = tmp_path_factory.mktemp("envoy")
    with run_documented_envoy(directory, "envoy-several.yaml", replacements) as address:
        yield f"proxy:///{address}"


@pytest.fixture
def F(proxy: str) -> Iterator[Connection]:
    with deconvd_client.connect(proxy) as connection:
        yield connection


def test_each_W_has_a_server_and_only_those_of_a_lost_one_move(
    fleet: Fleet, F: Connection, proxy: str
) -> None:
    with deconvd_client.connect(proxy) as other:
        before = places_of_filters(fleet, F, other)
        lost = middle_server(before)
        with stop_server(fleet.servers[lost]):
            wait_until(lambda: all(lost not in each for each in places_of_filters(fleet, F, other)))
            later = places_of_filters(fleet, F, other)
        wait_until_used(fleet, F, lost)

    # for fewer servers Envoy puts each more often onto its ring, where they meet others' calls, too
    check_stickiness(before, later, lost, strays_part=0.25)


def test_tensors_of_any_size_and_residents_go_through(F: Connection) -> None:
    y = F.deconvolution_2d(LARGE, TWO)

    there = F.put(LARGE)
    kept, pullback = F.vjp(there, TWO)

    np.testing.assert_allclose(kept, y, rtol=1e-4, atol=1e-5)
    assert pullback(y).gx.shape == LARGE.shape  # type: ignore[union-attr]  # it is wanted
    np.testing.assert_array_equal(there.numpy(), LARGE)
    with pytest.raises(InvalidArgumentError, match="outsize"):
        F.deconvolution_2d(X, FILTERS[0], outsize=(100, 100))
    assert F.health() == "SERVING"


@pytest.mark.slow
def test_a_thousand_calls_lose_none_when_servers_are_killed_stopped_and_drained(
    fleet: Fleet, F: Connection
) -> None:
    lose_no_call(fleet, F)


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_call(fleet: Fleet, F: Connection) -> None:
    restart_all(fleet, F)


def test_a_proxy_is_named_as_one() -> None:
    with pytest.raises(InvalidArgumentError, match="target must name a proxy as proxy:///host:por"):
        deconvd_client.connect("proxy:///unix:/run/envoy.sock")
    with pytest.raises(InvalidArgumentError, match="transport must be auto or grpc behind a proxy"):
        deconvd_client.connect("proxy:///envoy:1", transport="unix")
    with pytest.raises(InvalidArgumentError, match="target must name a proxy alone"):
        deconvd_client.connect(["proxy:///envoy:1", "proxy:///envoy:2"])
    with pytest.raises(InvalidArgumentError, match="target must be host:port"):
        deconvd_client.connect("proxy:///envoy")
