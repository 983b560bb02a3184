"""The client against a real server: what a caller sees."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from deconvd_client import (
    CallCancelledError,
    Connection,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from tests.servers import ServerProcess, call_until_served, server_process

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
W = rng.standard_normal((3, 2, 3, 3)).astype(np.float32)
B = np.arange(2, dtype=np.float32)
SLOW_X = np.ones((32, 64, 64, 64), np.float32)  # with SLOW_W, a second or more of work
SLOW_W = np.ones((64, 64, 9, 9), np.float32)


def test_the_signature_is_chainers(F: Connection) -> None:
    signature = inspect.signature(F.deconvolution_2d)

    arguments = [str(p).split(":")[0] for p in signature.parameters.values()]
    defaults = [p.default for p in signature.parameters.values()]
    kinds = [p.kind for p in signature.parameters.values()]

    assert arguments == ["x", "W", "b", "stride", "pad", "outsize", "dilate", "groups"]
    assert defaults == [inspect.Parameter.empty] * 2 + [None, 1, 0, None, 1, 1]
    assert (
        kinds
        == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 6 + [inspect.Parameter.KEYWORD_ONLY] * 2
    )


def test_deterministic_is_answered_as_chainer_does(F: Connection) -> None:
    deconvolution_2d: Any = F.deconvolution_2d
    with pytest.raises(ValueError, match="deterministic argument is not supported anymore"):
        deconvolution_2d(X, W, deterministic=None)


def test_unknown_keywords_are_named_in_order(F: Connection) -> None:
    deconvolution_2d: Any = F.deconvolution_2d
    with pytest.raises(TypeError, match=r"deconvolution_2d\(\) got .* 'cover_all', 'padding'"):
        deconvolution_2d(X, W, padding=1, cover_all=True)


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "message"),
    [
        ({}, W, {}, "x must be an array of numpy, cupy, .*, or a RemoteTensor, got dict"),
        (
            X.astype(int),
            W,
            {},
            "x must have one of the element types float16, bfloat16.* got int64",
        ),
        (X[0], W, {}, "x must have 4 dimensions, got 3"),
        (X, W[:2], {}, "W must have as many input channels"),
        (X, W, {"b": B[:1]}, "b must have c_O elements"),
        (X, W, {"b": B.astype(np.float64)}, "b must have c_O elements of x's element type"),
        (X, W, {"stride": 0}, r"stride must be from 1 to 2147483647, got \(0, 0\)"),
        (X, W, {"stride": 1.5}, "stride must be an int or a pair of ints, got 1.5"),
        (X, W, {"pad": (1, -1)}, r"pad must be from 0 to 2147483647, got \(1, -1\)"),
        (X, W, {"pad": (1, 2, 3)}, r"pad must be an int or a pair of ints, got \(1, 2, 3\)"),
        (X, W, {"dilate": (0, 1)}, r"Dilate should be positive, but \(0, 1\) is supplied."),
        (X, W, {"groups": 2}, "groups must divide the number of input channels, 3, got 2"),
        (X, W, {"groups": 0}, "groups must be from 1 to 2147483647, got 0"),
        (X, W, {"outsize": 7}, "outsize must be None or a pair, each an int or None, got 7"),
        (X, W, {"outsize": (0, 7)}, r"outsize must be from 1 to 2147483647, got \(0, 7\)"),
        (X, W, {"outsize": (6, 8)}, r"outsize: width must be from 7 to 7 \(the natural size is 7"),
        (X, W, {"pad": (1, 4)}, "Width in the output must be positive. It would be -1"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    x: Any, w: Any, kwargs: dict[str, Any], message: str
) -> None:
    with (
        deconvd_client.connect("unix:nobody-listens-here") as F,
        pytest.raises(InvalidArgumentError, match=message) as raised,
    ):
        F.deconvolution_2d(x, w, **kwargs)

    assert isinstance(raised.value, ValueError)


def test_gy_must_have_the_shape_of_y(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="gy must have the shape and element type"):
        F.deconvolution_2d_grad(X, W, None, X)


@pytest.mark.parametrize("wanted", ["gx", ["gx", "gy"], []])
def test_wanted_must_name_gradients(F: Connection, wanted: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="wanted must"):
        F.deconvolution_2d_grad(X, W, B, F.deconvolution_2d(X, W), wanted=wanted)


def test_wanted_must_name_more_than_gb_where_there_is_no_b(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match=r"there is no b, got \['gb'\]"):
        F.deconvolution_2d_grad(X, W, None, F.deconvolution_2d(X, W), wanted=["gb"])


def test_the_gradient_of_a_single_operand_can_be_had_alone(F: Connection) -> None:
    gy = F.deconvolution_2d(X, W, B)
    all_three = F.deconvolution_2d_grad(X, W, B, gy)

    for name, whole in all_three._asdict().items():
        alone = F.deconvolution_2d_grad(X, W, B, gy, wanted=[name])._asdict()
        np.testing.assert_array_equal(alone.pop(name), whole)
        assert set(alone.values()) == {None}


def test_gb_is_none_where_b_is(F: Connection) -> None:
    assert F.deconvolution_2d_grad(X, W, None, F.deconvolution_2d(X, W)).gb is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_element_type_comes_back_as_it_went(F: Connection, dtype: Any) -> None:
    y = F.deconvolution_2d(X.astype(dtype), W)

    assert y.dtype == dtype
    # bfloat16 has 8 bits: a result of magnitude 16 is off by up to 2**-4
    np.testing.assert_allclose(y.astype(np.float64), F.deconvolution_2d(X, W), atol=0.07)


@pytest.mark.parametrize(
    "x",
    [X[:, :, ::-1], np.asfortranarray(X), X.astype(">f4"), np.repeat(X, 2, axis=3)[..., ::2]],
    ids=["reversed", "fortran", "big-endian", "strided"],
)
def test_any_layout_goes_in_and_is_left_alone(F: Connection, x: Any) -> None:
    x.flags.writeable = False
    before = x.copy()

    y = F.deconvolution_2d(x, W)

    np.testing.assert_array_equal(y, F.deconvolution_2d(np.array(x, np.float32, order="C"), W))
    np.testing.assert_array_equal(x, before)
    assert y.flags.writeable
    assert y.dtype == np.float32


def test_using_config_holds_for_its_block_and_its_thread(F: Connection) -> None:
    with F.using_config("use_cudnn", "never"), F.using_config("autotune", True):
        inside = F._config.options
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(lambda: F._config.options).result()
        F.deconvolution_2d(X, W)

    assert (inside.use_cudnn, inside.autotune) == ("never", True)
    assert elsewhere == F._config.options
    assert not elsewhere.autotune


def test_defaults_hold_where_using_config_has_set_nothing(F: Connection) -> None:
    with F.using_config("autotune", False), F.using_config("use_cudnn", "never"):
        with F.using_defaults({"autotune": True, "use_cudnn": "always", "allow_tf32": True}):
            inside = F._config.options
            with F.using_config("allow_tf32", False):
                innermost = F._config.options
        after = F._config.options

    assert (inside.autotune, inside.use_cudnn, inside.allow_tf32) == (False, "never", True)
    assert not innermost.allow_tf32
    assert not after.allow_tf32


def test_a_wrong_default_is_refused(F: Connection) -> None:
    with pytest.raises(ValueError, match="use_cudnn must be 'auto', 'always' or 'never'"):
        with F.using_defaults({"use_cudnn": "sometimes"}):
            pass


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cudnn_fast", True, "name must be one of cudnn_deterministic, autotune"),
        ("autotune", "yes", "autotune must be True or False, got 'yes'"),
        ("use_cudnn", "sometimes", "use_cudnn must be 'auto', 'always' or 'never'"),
        ("use_cudnn_tensor_core", "no", "use_cudnn_tensor_core must be 'auto', 'always' or 'nev"),
    ],
)
def test_a_wrong_configuration_is_refused(
    F: Connection, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message), F.using_config(name, value):
        pass


def test_server_info_says_what_the_server_is(F: Connection) -> None:
    info = F.server_info()

    assert info.version == deconvd_client.__version__
    assert [device.id for device in info.devices] == ["cpu"]
    assert info.element_types == ("float16", "bfloat16", "float32", "float64")
    assert info.max_message_bytes == 1 << 30


def test_threads_may_share_a_connection(F: Connection) -> None:
    xs = [rng.standard_normal((1 + i % 3, 3, 4 + i, 5)).astype(np.float32) for i in range(40)]
    one_by_one = [F.deconvolution_2d(x, W, B) for x in xs]

    with ThreadPoolExecutor(16) as threads:
        at_once = list(threads.map(lambda x: F.deconvolution_2d(x, W, B), xs))

    for left, right in zip(one_by_one, at_once, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_call_ends_at_its_deadline_and_the_server_lives_on(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target, timeout_s=0.1) as hasty:
        with pytest.raises(DeadlineError):
            hasty.deconvolution_2d(SLOW_X, SLOW_W)

    with deconvd_client.connect(server.target) as patient:
        assert patient.deconvolution_2d(X, W).shape == (2, 2, 6, 7)


@pytest.mark.usefixtures("impatient")
def test_nobody_there_is_said_after_a_few_tries() -> None:
    with (
        deconvd_client.connect("unix:nobody-listens-here") as F,
        pytest.raises(UnavailableError, match="nobody-listens-here") as raised,
    ):
        F.deconvolution_2d(X, W)

    assert isinstance(raised.value, ConnectionError)


def test_a_call_waits_out_the_start_of_its_server(socket_directory: Path) -> None:
    with (
        deconvd_client.connect(f"unix:{socket_directory}/deconvd.sock") as F,
        ThreadPoolExecutor(1) as caller,
    ):
        early = caller.submit(call_until_served, F, X, W)
        with server_process(socket_directory):
            assert early.result(timeout=60).shape == (2, 2, 6, 7)


def test_a_result_beyond_all_memory_is_refused_before_it_is_computed(
    server: ServerProcess,
) -> None:
    one = np.ones((1, 1, 2, 2), np.float32)
    with (
        deconvd_client.connect(server.target, timeout_s=10) as F,
        pytest.raises(ExhaustedError, match=r"the call needs \d+ bytes of the host's memory"),
    ):
        F.deconvolution_2d(one, one, stride=2**20)


def test_an_oversized_response_is_told_the_option_to_raise(server: ServerProcess) -> None:
    with (
        deconvd_client.connect(server.target, max_message_bytes=100) as F,
        pytest.raises(ExhaustedError, match=r"response has \d+ bytes.*max_message_bytes"),
    ):
        F.deconvolution_2d(X, W)


def test_more_than_four_mebibytes_go_both_ways(F: Connection) -> None:
    x = rng.standard_normal((4, 3, 512, 512)).astype(np.float32)

    y = F.deconvolution_2d(x, np.eye(3, dtype=np.float32)[:, :, None, None])

    np.testing.assert_array_equal(y, x)


def test_a_closed_connection_says_so(server: ServerProcess) -> None:
    F = deconvd_client.connect(server.target)
    F.close()

    with pytest.raises(CallCancelledError, match="connection is closed"):
        F.deconvolution_2d(X, W)


def test_closing_ends_the_calls_under_way(server: ServerProcess) -> None:
    F = deconvd_client.connect(server.target)
    failures: list[DeconvdError] = []

    def call() -> None:
        try:
            F.deconvolution_2d(SLOW_X, SLOW_W)
        except DeconvdError as error:
            failures.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    with deconvd_client.connect(server.target) as other:
        other.deconvolution_2d(X, W)
    F.close()
    caller.join(timeout=60)

    assert [type(failure) for failure in failures] == [CallCancelledError]


@pytest.mark.parametrize("target", ["", "gpu-host", "unix:", 50051, "http://gpu-host"])
def test_a_wrong_target_is_refused(target: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="target must be host:port or unix:path"):
        deconvd_client.connect(target)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s must be positive"):
        deconvd_client.connect("gpu-host:50051", timeout_s=timeout_s)


@pytest.mark.parametrize("n", [2, 40])
def test_the_ledger_says_where_the_time_went(F: Connection, n: int) -> None:
    x = np.ones((n, 3, 100, 100), np.float32)

    F.deconvolution_2d(x, W)

    ledger = F.last_ledger
    assert set(ledger) == {"queue_us", "compute_us", "server_us"}
    assert ledger["compute_us"] > 0
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: F.last_ledger).result() == {}
