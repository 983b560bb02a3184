"""Arguments of every kind: numbers of other libraries do what they say, and what cannot be meant is named."""

from __future__ import annotations

import datetime
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from deconvd.model.geometry import Geometry
from deconvd_client import Connection, InvalidArgumentError
from tests.servers import ServerProcess, server_process

X = np.ones((1, 4, 8, 8), np.float32)
LARGE_X = np.ones((16, 4, 200, 200), np.float32)  # over 4 MiB: sent in a stream
W = np.ones((4, 1, 3, 3), np.float32)

CALLS: dict[str, Callable[[Connection], object]] = {
    "message": lambda F: F.deconvolution_2d(X, W),
    "stream": lambda F: F.deconvolution_2d(LARGE_X, W),
    "put": lambda F: F.put(X).numpy(),
    "server_info": lambda F: F.server_info(),
    "health": lambda F: F.health(),
}


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with server_process(tmp_path_factory.mktemp("server"), listen=("127.0.0.1:0",)) as running:
        yield running


@pytest.mark.parametrize(
    "timeout_s",
    [
        np.float32(60),
        np.float64(60),
        np.int64(60),
        np.array(60.0),
        np.array(60),
        ml_dtypes.bfloat16(60),
        np.longdouble(60),
        Decimal(60),
        Fraction(121, 2),
        9e9,
        10**30,
        1e300,
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_timeout_may_be_any_number(
    tcp_server: ServerProcess, timeout_s: Any, transport: str
) -> None:
    with deconvd_client.connect(tcp_server.target, timeout_s=timeout_s, transport=transport) as F:
        for call in CALLS.values():
            call(F)


@pytest.mark.parametrize("name", CALLS)
def test_a_very_long_timeout_is_no_short_one_on_a_unix_socket(
    server: ServerProcess, name: str
) -> None:
    with deconvd_client.connect(server.target, timeout_s=9e9) as F:
        CALLS[name](F)


@pytest.mark.parametrize(
    "timeout_s",
    [
        None,
        "60",
        b"60",
        np.str_("60"),
        True,
        np.True_,
        1j,
        np.complex64(1),
        np.ma.masked,
        np.ma.array(60.0),
        np.array([60.0]),
        np.timedelta64(60, "s"),
        datetime.timedelta(seconds=60),
        [60],
    ],
    ids=repr,
)
def test_what_is_no_number_of_seconds_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s must be a number") as raised:
        deconvd_client.connect("gpu-host:50051", timeout_s=timeout_s)

    assert raised.value.argument == "timeout_s"
    assert repr(timeout_s) in str(raised.value)


@pytest.mark.parametrize(
    "timeout_s",
    [10**5000, Decimal("inf"), np.float32("nan"), -(10**5000)],
    ids=["huge", "infinite", "nan", "least"],
)
def test_seconds_without_measure_are_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s must be positive and finite"):
        deconvd_client.connect("gpu-host:50051", timeout_s=timeout_s)


@pytest.mark.parametrize("size", [np.int64(1 << 20), np.array(1 << 20), np.uint32(1 << 20)])
def test_max_message_bytes_may_be_any_integer(server: ServerProcess, size: Any) -> None:
    with deconvd_client.connect(server.target, max_message_bytes=size) as F:
        assert F.deconvolution_2d(X, W).shape == (1, 1, 10, 10)


@pytest.mark.parametrize("size", [0, -1, 2**31, 1e6, "1000", None, True], ids=repr)
def test_max_message_bytes_must_be_an_int_in_its_range(size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"max_message_bytes must be an int from 1 to"):
        deconvd_client.connect("gpu-host:50051", max_message_bytes=size)


@pytest.mark.parametrize("transport", [None, 1, "", "TCP", ["tcp"], {}], ids=repr)
def test_a_transport_must_be_one_that_there_is(transport: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="transport must be one of auto, shared_memory"):
        deconvd_client.connect("gpu-host:50051", transport=transport)


@pytest.mark.parametrize("port", ["0", "65536", "70000", "99999999999999999999", "00000000080"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "dns:///gpu-host"])
def test_a_port_must_be_one_that_there_is(host: str, port: str) -> None:
    with pytest.raises(InvalidArgumentError, match="target must have a port from 1 to 65535"):
        deconvd_client.connect(f"{host}:{port}")


@pytest.mark.parametrize("target", ["a:1, unix:b", "a:1,", "a:1,b", "a:1,,b:1"])
def test_several_targets_are_addresses_with_commas_between(target: str) -> None:
    with pytest.raises(InvalidArgumentError, match="target must be one address, host:port or"):
        deconvd_client.connect(target)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "must name at least one server"),
        (["a:1", "b:1", "a:1"], "must name each server once, got 'a:1' and 'a:1'"),
        ("a:1,a:1", "must name each server once, got 'a:1' and 'a:1'"),
        (["a:1", "A.:01"], "must name each server once, got 'a:1' and 'A.:01'"),
        (["[::1]:1", "[0::1]:1"], "must name each server once"),
        (["unix:/a", "unix:///b/../a"], "must name each server once"),
        (["a:1", "b"], "must be host:port or unix:path, got 'b'"),
        (["unix:/a,b", "unix:/c"], "must be one address, host:port or unix:path"),
        (7, "must be host:port or unix:path, or a list of those, got 7"),
    ],
)
def test_each_of_several_targets_must_be_one(targets: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        deconvd_client.connect(targets)
    assert raised.value.argument == "target"


@pytest.mark.parametrize("targets", [["a:1", "unix:/b"], ("a:1", "unix:/b"), "a:1,unix:/b"])
def test_several_targets_are_a_list_or_a_string(targets: Any) -> None:
    with deconvd_client.connect(targets) as F, pickle.loads(pickle.dumps(F)) as copy:
        assert F.target == copy.target == "a:1,unix:/b"
        assert "2 of 2 servers in use" in repr(copy)


def test_several_targets_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONVD_TARGET", "a:1,b:1")
    with deconvd_client.connect() as F:
        assert "to a:1,b:1, 2 of 2 servers" in repr(F)


@pytest.mark.parametrize("letter", "%?#,")
def test_a_path_must_mean_the_same_to_grpc(letter: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^target must "
    ):  # it would call another socket
        deconvd_client.connect(f"unix:/run/a{letter}41")


@pytest.mark.parametrize("scheme", ["", "dns:///", "proxy:///"])
@pytest.mark.parametrize("host", ["a..b", ".a", "a" * 64])
def test_a_host_must_be_one_that_can_exist(scheme: str, host: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^target must name a host that can exist"):
        deconvd_client.connect(f"{scheme}{host}:1")


@pytest.mark.parametrize(
    "target",
    [
        b"gpu-host:1",
        "http://gpu-host:1",
        "gpu host:1",
        " gpu-host:1",
        "gpu-host:1\n",
        "::1:50051",
        "gpu-host:",
        "gpu-host:\N{ARABIC-INDIC DIGIT FIVE}",
        ":50051",
        "unix://",
        "unix://deconvd.sock",
        "unix://host/deconvd.sock",
    ],
    ids=repr,
)
def test_what_is_no_target_is_refused(target: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="target must be host:port or unix:path"):
        deconvd_client.connect(target)


def test_the_environment_names_the_target_of_connections_that_are_given_none(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECONVD_TARGET", server.target)

    with deconvd_client.connect() as F:
        assert F.target == server.target
        assert F.health() == "SERVING"
    with deconvd_client.connect("gpu-host:50051") as F:
        assert F.target == "gpu-host:50051"


@pytest.mark.parametrize("value", [None, ""])
def test_a_connection_without_any_target_says_where_one_can_be_given(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("DECONVD_TARGET", raising=False)
    if value is not None:
        monkeypatch.setenv("DECONVD_TARGET", value)

    with pytest.raises(
        InvalidArgumentError, match=r"target must be given, .* environment variable DECONVD_TARGET$"
    ) as raised:
        deconvd_client.connect()

    assert raised.value.argument == "target"


def test_a_wrong_target_of_the_environment_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONVD_TARGET", "gpu-host")

    with pytest.raises(
        InvalidArgumentError, match=r"^DECONVD_TARGET: target must be host:port or unix:path, got"
    ):
        deconvd_client.connect()


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="a path of at most 107 bytes, got 108"):
        deconvd_client.connect("unix:/" + "a" * 107)


@pytest.mark.parametrize("target", ["unix:/run/\udcff.sock", "gpu-\udcff:50051"], ids=ascii)
def test_a_target_that_is_no_utf8_is_refused(target: str) -> None:
    with pytest.raises(InvalidArgumentError, match="target must be a name in UTF-8"):
        deconvd_client.connect(target)


@pytest.mark.parametrize("target", ["unix:/run/a\0b.sock", "gpu\0host:1"], ids=ascii)
def test_a_target_has_no_null_character(target: str) -> None:
    with pytest.raises(InvalidArgumentError, match="target must not have a null character"):
        deconvd_client.connect(target)


@pytest.mark.parametrize(
    "target", ["gpu-host:1", "[::1]:1", "dns:///a.b:65535", "dns://9.9.9.9/a:1", "ipv6:[::1]:1"]
)
def test_every_form_of_target_is_taken(target: str) -> None:
    with deconvd_client.connect(np.str_(target)) as F:
        assert F.target == target
        assert type(F.target) is str


def test_a_tenant_key_that_is_too_long_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONVD_TENANT_KEY", "secret" * 20)

    with pytest.raises(
        InvalidArgumentError, match=r"DECONVD_TENANT_KEY must be .* 64 bytes, got 120"
    ) as raised:
        deconvd_client.connect("gpu-host:50051")

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", [np.str_("k"), np.bytes_(b"k"), "\udcff", ""])
def test_a_tenant_key_may_be_any_text_or_bytes(server: ServerProcess, key: Any) -> None:
    with deconvd_client.connect(server.target, tenant_key=key) as F:
        np.testing.assert_array_equal(F.put(X).numpy(), X)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (np.int64(3), (3,)),
        (np.array(3), (3,)),
        (np.array([2, 3]), (2, 3)),
        ([np.uint8(2), 3], (2, 3)),
        (iter((2, 3)), (2, 3)),
        ((), ()),
    ],
    ids=["an int", "an array of one", "an array", "a list", "an iterator", "none"],
)
def test_a_shape_may_be_made_of_any_integers(F: Connection, shape: Any, expected: Any) -> None:
    assert F.empty(shape, np.float32).shape == expected


@pytest.mark.parametrize("shape", [None, 2.0, (2.0, 3), "23", np.array([2.0]), 10**5000], ids=type)
def test_what_is_no_shape_is_refused(F: Connection, shape: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="shape must ") as raised:
        F.empty(shape, np.float32)

    assert raised.value.argument == "shape"


@pytest.mark.parametrize("dtype", ["float99", 7, [], "f4,f4", int])
def test_what_is_no_element_type_is_refused(F: Connection, dtype: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="dtype must ") as raised:
        F.empty((2, 3), dtype)

    assert raised.value.argument == "dtype"


@pytest.mark.parametrize("wanted", [None, 5, [["gx"]], "gx", ["gx", "gz"]])
def test_what_is_no_collection_of_gradients_is_refused(F: Connection, wanted: Any) -> None:
    gy = np.ones((1, 1, 10, 10), np.float32)

    with pytest.raises(InvalidArgumentError, match="wanted must be a collection of names"):
        F.deconvolution_2d_grad(X, W, None, gy, wanted=wanted)


@pytest.mark.parametrize("wanted", [iter(["gx"]), np.array(["gx"]), {"gx": 1}, ("gx",)])
def test_gradients_may_be_named_in_any_collection(F: Connection, wanted: Any) -> None:
    gy = np.ones((1, 1, 10, 10), np.float32)

    gradients = F.deconvolution_2d_grad(X, W, None, gy, wanted=wanted)

    assert gradients.gx is not None
    assert (gradients.gW, gradients.gb) == (None, None)


def test_a_switch_may_be_a_truth_value_of_numpy(F: Connection) -> None:
    with F.using_config("autotune", np.bool_(True)):
        assert F._config.options.autotune is True


@pytest.mark.parametrize("name", ["stride", "pad", "dilate", "groups"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_with_too_many_digits_to_write_down_is_refused(name: str, sign: int) -> None:
    value: Any = sign * 10**5000

    with pytest.raises(InvalidArgumentError, match=f"{name} must be .* got an int of 16610 bits"):
        Geometry.from_arguments(**{name: value})


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "soon"])
def test_the_command_refuses_a_wrong_timeout(seconds: str) -> None:
    command = [sys.executable, "-m", "deconvd_client.cli", "status", "--timeout-s", seconds]

    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert outcome.returncode in (1, 2)
    assert re.search("--timeout-s|timeout_s", outcome.stderr)
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    "option",
    [
        ["--threads", "1000000000"],
        ["--threads", "0"],
        ["--shared-memory-users", "9999999999"],
        ["--shared-memory-users", "\N{ARABIC-INDIC DIGIT FIVE}"],
        ["--direct-port", "70000"],
        ["--listen", "127.0.0.1:70000"],
        ["--listen", "unix:/run/\udcff.sock"],
    ],
    ids=str,
)
def test_the_server_names_an_option_that_cannot_be_meant(option: list[str]) -> None:
    command = [sys.executable, "-m", "deconvd_server", "--device", "cpu", *option]

    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert outcome.returncode in (1, 2)
    assert option[0] in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_tenant_key_that_cannot_be_encoded_is_in_no_part_of_the_error() -> None:
    with pytest.raises(InvalidArgumentError, match="a str that UTF-8 cannot encode") as raised:
        deconvd_client.connect("127.0.0.1:1", tenant_key="\ud800secret")

    assert raised.value.argument == "tenant_key"
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/nowhere"


def test_paths_of_bytes_are_refused_by_name() -> None:
    path: Any = BytesPath()

    with pytest.raises(InvalidArgumentError, match="token must be a file"):
        deconvd_client.connect("127.0.0.1:1", token=path)
    with pytest.raises(InvalidArgumentError, match="tls must have the path of a file as ca"):
        deconvd_client.Tls(ca=path)
