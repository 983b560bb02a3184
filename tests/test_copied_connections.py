"""Connections that are pickled, copied, or handed to other processes: the copy connects anew, without secrets."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import CallCancelledError, Connection, DeadlineError, InvalidArgumentError
from tests.servers import ServerProcess, only_server

X = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8)
W = np.ones((4, 1, 3, 3), np.float32)
SECRET = "the tenants own secret"


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def through_old_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing, protocol=0))


each_way = pytest.mark.parametrize(
    "duplicate", [through_pickle, through_old_pickle, copy.copy, copy.deepcopy]
)


@dataclass
class Layer:
    """What holds a connection, as models do."""

    F: Connection
    W: Array

    def __call__(self, x: Array) -> Array:
        return self.F.deconvolution_2d(x, self.W)


@each_way
def test_a_copy_connects_anew(server: ServerProcess, duplicate: Callable[[Any], Any]) -> None:
    with deconvd_client.connect(server.target) as F:
        expected = F.deconvolution_2d(X, W)
        again = duplicate(F)

    assert again is not F
    with again:  # though the original is closed
        np.testing.assert_array_equal(again.deconvolution_2d(X, W), expected)
        np.testing.assert_array_equal(again.put(X).numpy(), X)
    with pytest.raises(CallCancelledError):
        again.deconvolution_2d(X, W)


@each_way
def test_target_and_options_travel(duplicate: Callable[[Any], Any]) -> None:
    options: dict[str, Any] = {"timeout_s": 1.5, "max_message_bytes": 1 << 20, "transport": "tcp"}
    with deconvd_client.connect("gpu-host:50051", **options) as F, duplicate(F) as again:
        assert again.target == "gpu-host:50051"
        assert repr(again) == repr(F)
        assert pickle.dumps(again) == pickle.dumps(F)


def test_the_timeout_of_a_copy_is_in_force(server: ServerProcess) -> None:
    slow_x, slow_W = np.ones((32, 64, 64, 64), np.float32), np.ones((64, 64, 9, 9), np.float32)
    with (
        deconvd_client.connect(server.target, timeout_s=0.1) as F,
        copy.deepcopy(F) as again,
        pytest.raises(DeadlineError, match=r"0\.1 s"),
    ):
        again.deconvolution_2d(slow_x, slow_W)


@each_way
def test_an_object_that_holds_a_connection_can_be_copied(
    F: Connection, duplicate: Callable[[Any], Any]
) -> None:
    layer = Layer(F, W)

    again = duplicate(layer)

    np.testing.assert_array_equal(again(X), layer(X))
    if again.F is not F:  # copy.copy of the object shares it
        again.F.close()


@pytest.mark.parametrize("key", [SECRET, SECRET.encode()])
def test_a_tenants_key_is_in_no_pickle_and_no_text(key: str | bytes) -> None:
    with deconvd_client.connect("gpu-host:50051", tenant_key=key) as F:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert SECRET.encode() not in pickle.dumps(F, protocol)
        assert SECRET not in repr(F) + str(F)


def test_a_key_from_the_environment_is_in_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONVD_TENANT_KEY", SECRET)

    with deconvd_client.connect("gpu-host:50051") as F:
        assert SECRET.encode() not in pickle.dumps(F)


def tenant_key_of(F: Connection) -> bytes:
    """Return what a connection tells the server."""
    key: bytes = only_server(F).residents._session._tenant_key
    return key


def test_a_copy_takes_the_key_of_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECONVD_TENANT_KEY", raising=False)
    with deconvd_client.connect("gpu-host:50051", tenant_key=SECRET) as F:
        data = pickle.dumps(F)
        with pickle.loads(data) as without:
            assert tenant_key_of(without) == b""
        monkeypatch.setenv("DECONVD_TENANT_KEY", "that of this place")
        with pickle.loads(data) as within, copy.deepcopy(F) as copied:
            assert tenant_key_of(within) == tenant_key_of(copied) == b"that of this place"


def test_connect_takes_the_key_of_the_environment_unless_it_is_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DECONVD_TENANT_KEY", "one")
    with (
        deconvd_client.connect("gpu-host:50051") as by_environment,
        deconvd_client.connect("gpu-host:50051", tenant_key="two") as given,
        deconvd_client.connect("gpu-host:50051", tenant_key="") as alone,
    ):
        keys = [tenant_key_of(F) for F in (by_environment, given, alone)]

    assert keys == [b"one", b"two", b""]


def test_a_copy_begins_without_what_using_config_has_set(F: Connection) -> None:
    with F.using_config("autotune", True), copy.deepcopy(F) as again:
        assert F._config.options.autotune
        assert not again._config.options.autotune


def computed(F: Connection) -> Array:
    return F.deconvolution_2d(X, W)


def refused(F: Connection) -> None:
    F.deconvolution_2d(X, W[:2])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_process_can_be_given_a_connection(F: Connection, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) as pool:
        results = list(pool.map(computed, [F] * 3))
        results.append(pool.submit(Layer(F, W), X).result())
        results.append(pool.submit(F.deconvolution_2d, X, W).result())  # a bound method
        with pytest.raises(InvalidArgumentError, match="W must have as many") as raised:
            pool.submit(refused, F).result()

    for result in results:
        np.testing.assert_array_equal(result, F.deconvolution_2d(X, W))
    assert raised.value.argument == "W"


def test_a_pickle_is_read_by_a_process_that_has_imported_nothing(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as F:
        data = pickle.dumps(F)

    outcome = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            "import pickle, sys\nwith pickle.load(sys.stdin.buffer) as F: print(F.health())",
        ],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert outcome.stdout == b"SERVING\n", outcome.stderr


def test_a_connections_text_says_where_it_goes_and_how() -> None:
    with (
        deconvd_client.connect("gpu-host:50051") as F,
        deconvd_client.connect("unix:s", timeout_s=0.5, transport="unix") as other,
    ):
        assert repr(F) == "<deconvd_client.Connection to gpu-host:50051, timeout 60 s>"
        assert repr(other) == (
            "<deconvd_client.Connection to unix:s, by a Unix socket, no direct connection, "
            "timeout 0.5 s, transport unix>"
        )


def test_every_error_survives_a_pickle() -> None:
    for error in (
        InvalidArgumentError("no", argument="x"),
        deconvd_client.LostTensorError("gone", argument="W"),
        deconvd_client.UnavailableError("later", retry_after_s=2.0),
        DeadlineError("late"),
    ):
        again = through_pickle(error)
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_connection_that_could_not_be_made_can_be_shown() -> None:
    """As debuggers and pytest do with the names in a traceback."""
    with pytest.raises(InvalidArgumentError, match="timeout_s") as raised:
        deconvd_client.connect("gpu-host:50051", timeout_s=-1)

    shown = [
        repr(value)
        for frame in raised.traceback
        for value in frame.locals.values()
        if isinstance(value, deconvd_client.Connection)
    ]
    assert shown == ["<deconvd_client.Connection that was not made>"]
