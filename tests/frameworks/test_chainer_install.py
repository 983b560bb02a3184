"""Chainer's own functions, links and models are computed by a server while they are installed there."""

from __future__ import annotations

import itertools
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chainer
import numpy as np
import pytest
from chainer import links
from chainer.utils.type_check import InvalidType

import deconvd_client
from deconvd.errors import CallCancelledError, InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from deconvd_client.chainer import ChainerArgumentError, install
from deconvd_client.server import Server
from tests.servers import ServerProcess

OWN = chainer.functions.deconvolution_2d
OURS = "deconvolution_2d of deconvd"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note the calls that are made to servers, each as a `Call`."""
    noted: list[Any] = []
    execute = Server.execute

    def note(self: Server, call: Any, *deadline: Any) -> dict[str, Array]:
        noted.append(call)
        return execute(self, call, *deadline)

    monkeypatch.setattr(Server, "execute", note)
    return noted


@pytest.fixture(autouse=True)
def _is_uninstalled() -> Iterator[None]:
    yield
    assert chainer.functions.deconvolution_2d is OWN
    assert chainer.functions.connection.deconvolution_2d.deconvolution_2d is OWN


def uniform(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).uniform(-1, 1, shape).astype(np.float32)


X, W = uniform(2, 4, 3, 5), uniform(4, 3, 2, 2)


def creator() -> str:
    """Return what a call of Chainer's function is computed by."""
    return str(chainer.functions.deconvolution_2d(X, W).creator.label)


class Decoder(chainer.Chain):
    """Two deconvolutions, of which one is told its channels by its first input, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.first = links.Deconvolution2D(None, 6, 3, stride=2, pad=1, outsize=(6, 10))
            self.norm = links.BatchNormalization(6)
            self.second = links.Deconvolution2D(6, 4, 4, groups=2, nobias=True)
            self.last = links.Convolution2D(4, 2, 3)

    def forward(self, x: Any) -> Any:
        h = chainer.functions.relu(self.norm(self.first(x)))
        return chainer.functions.tanh(self.last(self.second(h)))


def train(steps_count: int) -> dict[str, Array]:
    """Return the parameters of a decoder after some steps, which begin the same each time."""
    with chainer.using_config("dtype", np.float32):
        np.random.seed(0)  # Chainer's initializers draw from it
        model = Decoder()
        model(X)  # tells the first layer its channels
    optimizer = chainer.optimizers.MomentumSGD(0.1).setup(model)
    for _ in range(steps_count):
        y = model(chainer.Variable(X))  # of an array, Chainer's own gradient of W crashes
        loss = chainer.functions.mean_squared_error(y, np.ones_like(y.array))
        model.cleargrads()
        loss.backward()
        optimizer.update()
    return {name: parameter.array for name, parameter in sorted(model.namedparams())}


@pytest.mark.parametrize("convolution_gradients", [False, True])
def test_a_model_learns_the_same_on_a_server(
    F: Connection, calls: list[Any], convolution_gradients: bool
) -> None:
    before, expected = train(0), train(3)
    assert not calls

    with install(F, convolution_gradients=convolution_gradients):
        found = train(3)

    # of each step: two y, and two calls for gradients; gx and gW of the convolution, if asked for
    assert len(calls) == 2 + 3 * (4 + 2 * convolution_gradients)
    for name, weights in expected.items():
        np.testing.assert_allclose(found[name], weights, 1e-4, 1e-5, err_msg=name)
        assert name.endswith("/b") or not np.allclose(before[name], weights, 1e-4, 1e-5)


def test_functions_and_links_are_routed_within_the_block(F: Connection, calls: list[Any]) -> None:
    link = links.Deconvolution2D(4, 3, 2)

    with install(F):
        y = chainer.functions.deconvolution_2d(X, W, stride=2)
        labels = creator(), link(X).creator.label

    assert labels == (OURS, OURS)
    assert len(calls) == 3
    assert isinstance(y, chainer.Variable)
    np.testing.assert_allclose(y.array, OWN(X, W, stride=2).array, 1e-4, 1e-5)
    assert creator() == link(X).creator.label == "Deconvolution2DFunction"
    assert len(calls) == 3


def test_it_holds_for_the_process_until_it_is_uninstalled(F: Connection) -> None:
    installation = install(F)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(creator()))
    thread.start()
    thread.join()
    installation.uninstall()
    installation.uninstall()

    assert found == [OURS]
    assert creator() == "Deconvolution2DFunction"


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_the_newest_of_several_installations_counts(
    server: ServerProcess, order: tuple[int, ...]
) -> None:
    with (
        deconvd_client.connect(server.target) as one,
        deconvd_client.connect(server.target) as other,
    ):
        connections = [one, other, one]
        installations = [install(connection) for connection in connections]
        there = {0, 1, 2}
        for number in order:
            assert connection_in_use() is connections[max(there)]
            installations[number].uninstall()
            there.remove(number)


def connection_in_use() -> Any:
    return chainer.functions.deconvolution_2d(X, W).creator._connection


def test_an_address_opens_a_connection_that_ends_with_the_block(server: ServerProcess) -> None:
    with install(server.target) as installation:
        assert creator() == OURS

    with pytest.raises(CallCancelledError):
        installation.connection.deconvolution_2d(X, W)


def test_without_an_address_the_environment_has_it(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECONVD_TARGET", server.target)
    with install() as installation:
        assert creator() == OURS
    assert installation.connection.target == server.target


def test_a_connection_that_was_given_stays_open(F: Connection) -> None:
    with install(F):
        pass

    assert F.deconvolution_2d(X, W).shape == (2, 3, 4, 6)


def test_a_wrong_address_installs_nothing() -> None:
    with pytest.raises(InvalidArgumentError, match="target"):
        install("nowhere")
    assert creator() == "Deconvolution2DFunction"


def convolve_and_differentiate(order: int) -> list[Array]:
    """Return y of a convolution and its gradients of some order."""
    x, filters, b = map(chainer.Variable, (X, uniform(6, 2, 2, 3), uniform(6)))
    y = chainer.functions.convolution_2d(
        x, filters, b, stride=(2, 1), pad=(0, 1), groups=2, cover_all=True
    )
    gradients = [chainer.functions.sum(y**3)]
    for _ in range(order):
        total = sum(chainer.functions.sum(gradient**2) for gradient in gradients)
        gradients = chainer.grad([total], [x, filters, b], enable_double_backprop=True)
    return [y.array, *(gradient.array for gradient in gradients)]


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_convolutions_stay_chainers(
    F: Connection, calls: list[Any], order: int
) -> None:
    expected = convolve_and_differentiate(order)
    with install(F):
        found = convolve_and_differentiate(order)

    assert not calls
    for mine, chainers in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, chainers)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_convolutions_go_to_the_server_if_asked_for(
    F: Connection, calls: list[Any], order: int
) -> None:
    expected = convolve_and_differentiate(order)
    with install(F, convolution_gradients=True):
        found = convolve_and_differentiate(order)

    assert len(calls) >= 2 * order
    for mine, chainers in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, chainers, 1e-3, 1e-3)


def test_chainers_own_graph_stays_its_own_when_it_is_differentiated_later(
    F: Connection, calls: list[Any]
) -> None:
    def differentiate(y: Any, x: Any, filters: Any) -> list[Array]:
        first = chainer.grad([y], [x, filters], enable_double_backprop=True)
        total = sum(chainer.functions.sum(gradient**2) for gradient in first)
        return [gradient.array for gradient in chainer.grad([total], [x, filters])]

    x, filters = chainer.Variable(X), chainer.Variable(W)
    y = chainer.functions.deconvolution_2d(x, filters)
    expected = differentiate(y, x, filters)
    with install(F):
        found = differentiate(y, x, filters)

    assert not calls
    for mine, chainers in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, chainers)


def test_a_graph_goes_on_at_its_server_after_the_block(F: Connection, calls: list[Any]) -> None:
    x = chainer.Variable(X)
    with install(F):
        y = chainer.functions.deconvolution_2d(x, W)

    chainer.functions.sum(y).backward()

    assert len(calls) == 2
    expected: Any = F.deconvolution_2d_grad(X, W, None, np.ones_like(y.array)).gx
    np.testing.assert_allclose(x.grad, expected)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "channels": (lambda: chainer.functions.deconvolution_2d(X, W[1:]), "W"),
    "groups": (lambda: chainer.functions.deconvolution_2d(X, W, groups=3), "groups"),
    "dilate": (lambda: chainer.functions.deconvolution_2d(X, W, dilate=0), "dilate"),
    "outsize": (lambda: chainer.functions.deconvolution_2d(X, W, outsize=(1, 1)), "outsize"),
    "link": (lambda: links.Deconvolution2D(3, 3, 2)(X), "W"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_invalid_types_too(F: Connection, wrong: str) -> None:
    call, argument = WRONG[wrong]
    with install(F), pytest.raises(InvalidType) as raised:
        call()

    error: Any = raised.value
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        assert type(one) is ChainerArgumentError
        assert (one.argument, str(one)) == (argument, str(error))
        assert (one.expect, one.actual) == (error.expect, error.actual)


@pytest.mark.parametrize("keyword", ["deterministic", "padding"])
def test_unknown_keywords_raise_what_chainer_raises(F: Connection, keyword: str) -> None:
    with pytest.raises((TypeError, ValueError)) as own:
        OWN(X, W, **{keyword: None})
    with install(F), pytest.raises(own.type) as raised:
        chainer.functions.deconvolution_2d(X, W, **{keyword: None})

    assert keyword in str(raised.value)


CONFIGURATIONS = [
    ("cudnn_deterministic", True),
    ("autotune", True),
    ("use_cudnn", "never"),
    ("use_cudnn_tensor_core", "never"),
]


def options_of(call: Any) -> dict[str, Any]:
    options = call.request.options
    names = {"use_cudnn": {0: "auto", 1: "auto", 2: "always", 3: "never"}}
    names["use_cudnn_tensor_core"] = names["use_cudnn"]
    return {
        name: names[name][getattr(options, name)] if name in names else getattr(options, name)
        for name, _ in CONFIGURATIONS
    }


@pytest.mark.parametrize(("name", "value"), CONFIGURATIONS)
def test_chainers_configuration_is_read_at_each_call(
    F: Connection, calls: list[Any], name: str, value: Any
) -> None:
    x = chainer.Variable(X)
    y: Any = F.deconvolution_2d(x, W)
    with chainer.using_config(name, value):
        F.deconvolution_2d(x, W)
        chainer.functions.sum(y).backward()
        F.deconvolution_2d(X, W)  # of no Variable

    defaults = options_of(calls[0])
    changed = {**defaults, name: value}
    assert defaults[name] != value
    assert [options_of(call) for call in calls] == [defaults, changed, changed, defaults]


def test_a_block_of_using_config_comes_before_chainers_configuration(
    F: Connection, calls: list[Any]
) -> None:
    with chainer.using_config("use_cudnn", "always"), chainer.using_config("autotune", True):
        with F.using_config("use_cudnn", "auto"), install(F):
            chainer.functions.deconvolution_2d(X, W)

    assert options_of(calls[0])["use_cudnn"] == "auto"
    assert options_of(calls[0])["autotune"] is True


@pytest.mark.parametrize("name", ["use_cudnn", "use_cudnn_tensor_core"])
def test_a_wrong_configuration_of_chainers_is_an_error(F: Connection, name: str) -> None:
    with chainer.using_config(name, "sometimes"), pytest.raises(ValueError, match=name):
        F.deconvolution_2d(chainer.Variable(X), W)


def test_the_readme_shows_what_works(server: ServerProcess, calls: list[Any]) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    blocks = re.findall(r"```python no-run\n(.*?)```", readme.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "deconvd_client.chainer" in block]
    weights = chainer.Parameter(W)

    def model(x: Any) -> Any:
        return chainer.functions.sum(chainer.functions.deconvolution_2d(x, weights))

    exec(block.replace("gpu-host:50051", server.target), {"model": model, "x": X})

    assert len(calls) == 2
    assert weights.grad is not None


def test_an_installation_says_what_it_does(F: Connection) -> None:
    with install(F) as of_functions, install(F, convolution_gradients=True) as of_gradients:
        said = f"<deconvd_client.chainer.Installation of {F!r}"
        assert repr(of_functions) == f"{said}>"
        assert repr(of_gradients) == f"{said}, with gradients of convolutions>"
