"""Several real servers behind one name: which of them serves what, and what becomes of calls when some of them fail."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import deconvd_client
import deconvd_client.aio
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    InvalidArgumentError,
    LostTensorError,
    UnavailableError,
)
from deconvd.model.dtypes import Array
from deconvd_client import Connection, Tls
from deconvd_client.calls.deadline import Deadline
from deconvd_client.cli.main import main
from deconvd_client.residents import Call
from deconvd_client.server_set.replica import Replica
from deconvd_client.server_set.server_set import ServerSet
from deconvd_client.transports.direct import striped_transport
from tests.certificates import Authority
from tests.fleets import (
    FILTERS,
    HOSTS,
    LARGE,
    MAX_LOSS_S,
    TWO,
    Fleet,
    X,
    check_stickiness,
    lose_no_call,
    middle_server,
    places_of_filters,
    restart_all,
    running_fleet,
    wait_for_serving,
)
from tests.processes import exit_code, wait_until
from tests.secured_servers import certified, secured_process
from tests.servers import free_port, stop_server

BIAS = np.zeros(2, np.float32)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def F(fleet: Fleet) -> Iterator[Connection]:
    """A connection to all of them, by TCP as to other hosts."""
    with deconvd_client.connect(fleet.targets, transport="tcp") as connection:
        yield connection


def home_of(F: Connection) -> int:
    """Return the number of the server that has the residents of a connection."""
    assert isinstance(F._server, ServerSet)
    home = F._server.residents.home_preference.holders[0]
    return F.target.split(",").index(home.identity.decode())


def test_each_W_has_a_server_and_only_those_of_a_lost_one_move(fleet: Fleet) -> None:
    with deconvd_client.connect(fleet.targets, transport="tcp") as F:
        before = places_of_filters(fleet, F)
        lost = middle_server(before)
        with stop_server(fleet.servers[lost]):
            F.deconvolution_2d(X, FILTERS[before.index([lost] * 3)])
            later = places_of_filters(fleet, F)
        wait_for_serving(F, 3)

    check_stickiness(before, later, lost)


def test_a_large_batch_is_computed_by_all_of_them(fleet: Fleet, F: Connection) -> None:
    with deconvd_client.connect(fleet.targets[0]) as one:
        y = one.deconvolution_2d(LARGE, TWO)
        gradients = one.deconvolution_2d_grad(LARGE, TWO, BIAS, y)

    with F.using_request_id("large"), F.ledgers() as ledgers:
        np.testing.assert_allclose(F.deconvolution_2d(LARGE, TWO), y, rtol=1e-4, atol=1e-5)
    with F.using_request_id("large-gradients"):
        found = F.deconvolution_2d_grad(LARGE, TWO, BIAS, y)

    assert fleet.places(["large", "large-gradients"], 3) == [[0, 1, 2], [0, 1, 2]]
    assert len(ledgers) == 3
    assert F.last_ledger["server_us"] > 0
    for gradient, expected in zip(found, gradients, strict=True):
        assert gradient is not None
        assert expected is not None
        atol = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=atol)


def test_the_same_set_gives_the_same_bits_whoever_is_alive(
    fleet: Fleet, F: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where other calls would be striped
    monkeypatch.setattr(striped_transport, "processors_count", lambda: 16)
    gy = np.random.default_rng(1).standard_normal((12, 2, 512, 512)).astype(np.float32)
    with F.using_config("cudnn_deterministic", True):
        first = F.deconvolution_2d_grad(LARGE, TWO, BIAS, gy)
        with stop_server(fleet.servers[1]):
            second = F.deconvolution_2d_grad(LARGE, TWO, BIAS, gy)
            assert "2 of 3 servers" in repr(F)
    wait_for_serving(F, 3)

    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums_of_half_precision_are_rounded_once(fleet: Fleet) -> None:
    x, gy = np.zeros(LARGE.shape, np.float16), np.zeros(LARGE.shape, np.float16)
    x[:, 0] = 1
    gy[0, 0, 0, :4], gy[0, 0, 0, 4] = (
        512,
        3.03125,
    )  # one part sums up to 2051.03, which float16 makes 2052
    gy[6, 0, 0, :8], gy[6, 0, 0, 8] = 512, 2.03125  # and the other to 4098.03, which it makes 4100
    W, b = TWO.astype(np.float16), BIAS.astype(np.float16)

    with deconvd_client.connect(fleet.targets[:2], transport="tcp") as F:
        gradients = F.deconvolution_2d_grad(x, W, b, gy)

    assert gradients.gW is not None
    assert gradients.gb is not None
    assert gradients.gW[0, 0, 0, 0] == gradients.gb[0] == np.float16(6149.0625)
    assert np.float16(6149.0625) != np.float16(2052 + 4100)


def test_an_error_of_one_part_is_the_error_of_the_call(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="outsize"):
        F.deconvolution_2d(LARGE, TWO, outsize=(5, 5))
    with (
        deconvd_client.connect(F.target, timeout_s=0.02, transport="tcp") as hasty,
        pytest.raises(DeadlineError, match="timeout_s"),
    ):
        hasty.deconvolution_2d(LARGE, TWO)


def test_residents_stay_together_and_move_when_their_server_falls_silent(
    fleet: Fleet, F: Connection
) -> None:
    expected = F.deconvolution_2d(X, FILTERS[0])
    x, W = F.put(X), F.put(FILTERS[0])
    y, pullback = F.vjp(x, W)
    with F.using_request_id("residents"):
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
    home = home_of(F)
    assert fleet.places(["residents"]) == [[home]]
    gx = pullback(y).gx

    with stop_server(fleet.servers[home]):
        with F.using_request_id("moved"):
            np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
        np.testing.assert_array_equal(x.numpy(), X)
        np.testing.assert_array_equal(pullback(y).gx, gx)
    wait_for_serving(F, 3)

    ((place,),) = fleet.places(["moved"])
    assert place != home
    with F.using_request_id("stayed"):
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
    assert fleet.places(["stayed"]) == [[place]]


def test_a_result_that_only_one_server_has_is_waited_for(fleet: Fleet, F: Connection) -> None:
    y = F.remote.deconvolution_2d(X, FILTERS[0])
    expected = y.numpy()
    assert isinstance(F._server, ServerSet)
    holder = F._server.residents._holder_of(y._resident)
    assert holder is not None
    number = F._server._balancer.members.index(holder)

    fetched: list[Array] = []
    with stop_server(fleet.servers[number]):
        thread = threading.Thread(target=lambda: fetched.append(y.numpy()))
        thread.start()
        wait_for_serving(F, 2)
        F.deconvolution_2d(X, TWO[:, :1].repeat(4, axis=0))  # others are served meanwhile
        assert not fetched
    thread.join()

    np.testing.assert_array_equal(fetched[0], expected)
    wait_for_serving(F, 3)


def test_operands_that_different_servers_have_are_brought_together(
    fleet: Fleet, F: Connection
) -> None:
    images = np.random.default_rng(1).standard_normal((1, 1, 8, 8)).astype(np.float32)
    one = np.ones((1, 1, 1, 1), np.float32)
    kept = [F.remote.deconvolution_2d(images, one) for _ in range(12)]
    places = {F._server.residents._holder_of(y._resident) for y in kept}  # type: ignore[union-attr]  # as above
    assert len(places) > 1  # else there was nothing to bring together

    for gy in kept[1:]:
        gx = F.deconvolution_2d_grad(kept[0], one, None, gy, wanted=("gx", "gW")).gx
        np.testing.assert_array_equal(gx, images)


def test_what_a_call_fetches_from_another_server_has_the_deadline_of_the_call(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    with deconvd_client.connect(fleet.targets, transport="tcp", timeout_s=120) as F:
        server = F._server
        assert isinstance(server, ServerSet)
        kept = [F.remote.deconvolution_2d(np.ones_like(one), one) for _ in range(12)]
        holders = [server.residents._holder_of(y._resident) for y in kept]
        other = next(found for found in holders if found is not holders[0])
        assert other is not None
        gy = kept[holders.index(other)]
        gather = server.residents.gather

        def gather_late(call: Call, at: Replica, limit: Deadline) -> Call:
            return gather(call, at, limit.with_limit(0.5))  # as if the call had begun long ago

        monkeypatch.setattr(server.residents, "gather", gather_late)
        with stop_server(fleet.servers[server._balancer.members.index(other)]):
            began_s = time.monotonic()
            with pytest.raises(DeadlineError):
                F.deconvolution_2d_grad(kept[0], one, None, gy, wanted=("gx", "gW"))
            took_s = time.monotonic() - began_s
        wait_for_serving(F, 3)

    assert took_s < 60


def test_old_and_new_versions_serve_side_by_side(fleet: Fleet, F: Connection) -> None:
    with F.using_config("use_cudnn_tensor_core", "never"):  # which the last server does not know
        for number, W in enumerate(FILTERS):
            with F.using_request_id(f"new-{number}"):
                F.deconvolution_2d(X, W)

    places = fleet.places([f"new-{number}" for number in range(len(FILTERS))])
    assert {place for (place,) in places} == {0, 1}


@pytest.mark.slow
def test_a_thousand_calls_lose_none_when_servers_are_killed_stopped_and_drained(
    fleet: Fleet, F: Connection
) -> None:
    lose_no_call(fleet, F)


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_call(fleet: Fleet, F: Connection) -> None:
    restart_all(fleet, F)


def test_results_that_only_a_lost_server_had_are_lost(fleet: Fleet, F: Connection) -> None:
    F.put(X)
    home = home_of(F)
    y = F.remote.deconvolution_2d(F.put(X), FILTERS[0])

    fleet.servers[home].end(signal.SIGKILL)
    fleet.restart(home)

    with pytest.raises(LostTensorError, match="compute it again"):
        y.numpy()
    with pytest.raises(LostTensorError, match="x is lost"):
        F.deconvolution_2d(y, np.ones((32, 1, 1, 1), np.float32))


def test_nobody_there_is_an_error_that_names_all() -> None:
    targets = [f"127.0.0.1:{free_port()}", f"127.0.0.2:{free_port()}"]
    with (
        deconvd_client.connect(targets, fail_fast=True) as F,
        pytest.raises(UnavailableError) as raised,
    ):
        F.deconvolution_2d(X, FILTERS[0])

    assert all(target in str(raised.value) for target in targets)


def test_health_is_that_of_the_best(fleet: Fleet) -> None:
    with deconvd_client.connect([f"127.0.0.1:{free_port()}", fleet.targets[1]]) as F:
        assert F.health() == "SERVING"
        assert F.server_info().version == deconvd_client.__version__
    with pytest.raises(deconvd_client.CallCancelledError):
        F.deconvolution_2d(X, FILTERS[0])


def test_each_server_has_an_equal_part_of_the_time_in_which_health_is_asked_for() -> None:
    with ExitStack() as stack:
        # the system accepts connections, and nobody answers
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        targets = [f"127.0.0.1:{each.getsockname()[1]}" for each in silent]
        F = stack.enter_context(deconvd_client.connect(targets, timeout_s=1.5))
        began_s = time.monotonic()
        with pytest.raises((DeadlineError, UnavailableError)):
            F.health()
        passed_s = time.monotonic() - began_s

    assert passed_s > 1.4


def test_status_shows_each_of_several_servers(fleet: Fleet) -> None:
    away = f"127.0.0.1:{free_port()}"
    shown = CliRunner().invoke(main, ["status", "--target", ",".join(fleet.targets)])
    told = CliRunner().invoke(main, ["status", "--json", "--target", f"{away},{fleet.targets[0]}"])

    assert shown.exit_code == 0
    assert all(f"{target}: SERVING\n" in shown.output for target in fleet.targets)
    assert told.exit_code == 1
    one, other = map(json.loads, told.stdout.splitlines())
    assert one["target"] == away
    assert "SERVING" not in one["health"]
    assert other["health"] == "SERVING"


@pytest.mark.parametrize("words", [("top",), ("run", "x.npy", "W.npy", "-o", "y.npy")], ids=repr)
def test_other_commands_take_one_server(words: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(main, [*words, "--target", "a:1,b:1"])

    assert outcome.exit_code == 2
    assert "must be one address" in outcome.output


@pytest.mark.usefixtures("patient")
def test_servers_of_this_host_share_memory_until_one_is_stopped(fleet: Fleet) -> None:
    with deconvd_client.connect(fleet.targets) as F:
        assert F.shares_memory
        x = F.empty(LARGE.shape, LARGE.dtype)
        x[...] = LARGE
        y, gx = F.deconvolution_2d(x, TWO), F.deconvolution_2d_grad(x, TWO, None, LARGE).gx
        with stop_server(fleet.servers[1]):
            begin_s = time.monotonic()
            np.testing.assert_array_equal(F.deconvolution_2d(x, TWO), y)
            np.testing.assert_array_equal(F.deconvolution_2d_grad(x, TWO, None, LARGE).gx, gx)
            assert time.monotonic() - begin_s < 2 * MAX_LOSS_S
        wait_for_serving(F, 3)


def test_asyncio_calls_several_servers(fleet: Fleet, F: Connection) -> None:
    expected = [F.deconvolution_2d(X, W) for W in FILTERS[:8]]

    async def call_all() -> list[Array]:
        async with deconvd_client.aio.connect(fleet.targets, transport="tcp") as G:
            return await asyncio.gather(*(G.deconvolution_2d(X, W) for W in FILTERS[:8]))

    np.testing.assert_array_equal(asyncio.run(call_all()), expected)


def test_the_certificate_of_a_name_is_that_of_all_its_servers(
    authority: Authority, tmp_path: Path
) -> None:
    files = certified(authority.issue("localhost"))  # and not its address
    with secured_process(tmp_path, **files) as server:
        port = server.target.rpartition(":")[2]
        tls = Tls(ca=authority.ca)
        with deconvd_client.connect(f"dns:///localhost:{port}", tls=tls) as F:
            assert F.deconvolution_2d(X, FILTERS[0]).shape == (2, 32, 11, 11)
        with (
            deconvd_client.connect(["127.0.0.1:1", server.target], tls=tls, fail_fast=True) as F,
            pytest.raises(UnavailableError, match="certificate"),
        ):
            F.deconvolution_2d(X, FILTERS[0])


def test_a_forked_child_calls_them_by_itself(fleet: Fleet, F: Connection) -> None:
    expected = F.deconvolution_2d(X, FILTERS[0])

    def call_in_child() -> bool:
        with pytest.raises(UnavailableError, match="a forked child"):
            F.put(X)
        return "3 of 3 servers" in repr(F) and all(
            np.array_equal(F.deconvolution_2d(x, W), y)
            for x, W, y in ((X, FILTERS[0], expected), (LARGE, TWO, large))
        )

    large = F.deconvolution_2d(LARGE, TWO)
    assert exit_code(call_in_child) == 0
    np.testing.assert_array_equal(F.deconvolution_2d(X, FILTERS[0]), expected)


def test_a_dropped_connection_is_collected_at_once(fleet: Fleet) -> None:
    F = deconvd_client.connect(fleet.targets, transport="tcp")
    F.deconvolution_2d(LARGE, TWO)
    F.deconvolution_2d(X, FILTERS[0])
    reference = weakref.ref(F._server)

    del F

    wait_until(lambda: reference() is None)


def test_calls_can_be_cancelled_and_end_with_their_connection(fleet: Fleet, F: Connection) -> None:
    with (
        stop_server(fleet.servers[0]),
        stop_server(fleet.servers[1]),
        stop_server(fleet.servers[2]),
    ):
        future = F.submit(F.deconvolution_2d, X, FILTERS[0])
        large = F.submit(F.deconvolution_2d, LARGE, TWO)
        wait_until(lambda: future.running() and large.running())
        assert future.cancel()
        begin_s = time.monotonic()
        F.close()
        with pytest.raises(CallCancelledError):
            large.result()
        assert time.monotonic() - begin_s < 1 + MAX_LOSS_S


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_cards_of_one_kind_give_the_same_bits_for_the_same_set(
    tmp_path: Path, dtype: type[np.floating]
) -> None:
    x, gy = LARGE.astype(dtype), np.random.default_rng(1).standard_normal(LARGE.shape).astype(dtype)
    W, b = TWO.astype(dtype), BIAS.astype(dtype)
    with (
        running_fleet(tmp_path, "cuda") as fleet,
        deconvd_client.connect(fleet.targets, transport="tcp") as F,
        F.using_config("cudnn_deterministic", True),
    ):
        y, first = F.deconvolution_2d(x, W, b), F.deconvolution_2d_grad(x, W, b, gy)
        with stop_server(fleet.servers[1]):
            np.testing.assert_array_equal(F.deconvolution_2d(x, W, b), y)
            second = F.deconvolution_2d_grad(x, W, b, gy)
        with deconvd_client.connect(fleet.targets[0]) as one:
            whole = one.deconvolution_2d_grad(x, W, b, gy)

    rtol, atol = (5e-2, 5e-3) if dtype is np.float16 else (1e-4, 1e-5)
    for gradient, again, expected in zip(first, second, whole, strict=True):
        assert gradient is not None
        assert again is not None
        assert expected is not None
        np.testing.assert_array_equal(gradient, again)
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=atol * scale)


_BY_NAME = """
import sys
from pathlib import Path
import numpy as np
import deconvd_client
from deconvd_client.server_set import membership
from tests.fleets import HOSTS, wait_for_serving
from tests.processes import wait_until
membership._LOOKUP_INTERVAL_S = 0.1
hosts, port = Path("/etc/hosts"), sys.argv[1]
def publish(*addresses):
    hosts.write_text("".join(f"{address} deconvd.test\\n" for address in addresses))
x, W = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 2, 1, 1), np.float32)
publish(*HOSTS[:2])
with deconvd_client.connect(f"dns:///deconvd.test:{port}") as F:
    def call():
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), 2 * np.ones((1, 2, 4, 4)))
    def calls_find(words):
        call()
        return words in repr(F)
    call()
    assert "2 of 2 servers" in repr(F), F
    publish(*HOSTS)
    wait_until(lambda: calls_find("3 of 3 servers"))
    publish(HOSTS[2])
    wait_until(lambda: calls_find("1 of 1 servers"))
    publish()  # a name that is not found keeps its servers
    for _ in range(20):
        call()
    assert "1 of 1 servers" in repr(F), F
with deconvd_client.connect(f"dns:///deconvd.test:{port}", fail_fast=True) as F:
    try:
        call()
    except deconvd_client.UnavailableError as error:
        assert "deconvd.test" in str(error) and "cannot be looked up" in str(error), error
    else:
        raise AssertionError
    publish(*HOSTS)
    call()
"""


@pytest.mark.parametrize("x", [X, LARGE], ids=["small", "large"])
def test_a_name_that_is_not_found_yet_is_waited_for(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, x: Array
) -> None:
    look_up = socket.getaddrinfo
    failures = [socket.gaierror(socket.EAI_NONAME, "Name or service not known")] * 2

    def look_up_late(host: str, *args: Any, **options: Any) -> Any:
        if host == "deconvd.test" and failures:
            raise failures.pop()
        return look_up(HOSTS[0] if host == "deconvd.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_late)
    with deconvd_client.connect(f"dns:///deconvd.test:{fleet.port}") as F:
        W = FILTERS[0] if x is X else TWO
        assert F.deconvolution_2d(x, W).shape == deconvd_client.output_shape(x.shape, W.shape)
    assert not failures


def test_all_addresses_of_a_name_serve_and_it_is_looked_up_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("")
    in_namespace = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"']
    run = partial(subprocess.run, capture_output=True, text=True, timeout=100, check=False)
    try:
        possible = run([*in_namespace, str(hosts), "true"])
    except FileNotFoundError as error:
        pytest.skip(f"no mount namespaces here: {error}")
    if possible.returncode:
        pytest.skip(f"no hosts file of one's own may be mounted here: {possible.stderr.strip()}")

    command = [sys.executable, "-W", "error", "-c", _BY_NAME, str(fleet.port)]
    ended = run([*in_namespace, str(hosts), *command])

    assert ended.returncode == 0, ended.stderr
