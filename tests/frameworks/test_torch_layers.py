"""The layer in place of torch.nn.ConvTranspose2d."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import deconvd_client
from deconvd_client import Connection, InvalidArgumentError
from deconvd_client.torch import ConvTranspose2d, replace_layers
from tests.servers import ServerProcess

LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {
        "kernel_size": (4, 3),
        "stride": (2, 3),
        "padding": (1, 0),
        "output_padding": (1, 2),
        "groups": 2,
    },
    {"kernel_size": 3, "stride": 2, "dilation": 2, "bias": False},
    # more rows than a stride adds, which torch allows for less than the dilation
    {"kernel_size": 3, "stride": 1, "padding": 3, "dilation": 4, "output_padding": (3, 0)},
    {
        "kernel_size": 2,
        "stride": (2, 1),
        "padding": 1,
        "dilation": 4,
        "output_padding": (3, 3),
        "bias": False,
    },
]


def pair(
    F: Connection | None, **arguments: Any
) -> tuple[ConvTranspose2d, torch.nn.ConvTranspose2d]:
    """Return our layer and torch's with the same parameters."""
    ours = ConvTranspose2d(4, 6, **arguments, dtype=torch.float64, connection=F)
    theirs = torch.nn.ConvTranspose2d(4, 6, **arguments, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("arguments", LAYERS)
def test_a_layer_computes_what_torchs_does(F: Connection, arguments: dict[str, Any]) -> None:
    ours, theirs = pair(F, **arguments)
    for shape in ((2, 4, 5, 6), (4, 5, 6), (0, 4, 5, 6)):
        x = images(*shape)
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected)
        found = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
        reference = torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()])
        torch.testing.assert_close(found, reference)


def test_output_size_is_torchs(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3, stride=3, padding=1)
    x = images(2, 4, 5, 6)
    for size in ([13, 16], [14, 18], [15, 17], [2, 6, 14, 17]):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    torch.testing.assert_close(ours(x[0], [14, 17]), theirs(x[0], [14, 17]))
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="requested an output size of"):
            layer(x, output_size=[16, 18])


def test_channels_last_comes_back_as_such(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3)
    x = images(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, theirs(x))
    assert ours(images(2, 4, 5, 6)).is_contiguous()


def test_faults_are_named(F: Connection) -> None:
    ours, _ = pair(F, kernel_size=3)
    with pytest.raises(InvalidArgumentError, match="as many input channels"):
        ours(images(1, 3, 5, 6))
    with pytest.raises(ValueError, match="zeros"):
        ConvTranspose2d(4, 6, 3, padding_mode="reflect")


def test_copies_share_the_connection_and_pickles_connect_by_themselves(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3)
    x = images(2, 4, 5, 6)
    twin = copy.deepcopy(ours)
    assert twin.connection is F
    assert twin.weight is not ours.weight

    file = io.BytesIO()
    torch.save(torch.nn.Sequential(ours, torch.nn.ReLU()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), theirs(x).relu())
    with loaded[0].connection as connection:
        assert connection is not F
        assert connection.target == F.target

    weights = io.BytesIO()
    torch.save(ours.state_dict(), weights)
    weights.seek(0)
    theirs.load_state_dict(torch.load(weights))


def test_without_a_connection_all_layers_share_that_of_the_environment(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(None, kernel_size=3)
    x = images(2, 4, 5, 6)
    monkeypatch.delenv("DECONVD_TARGET", raising=False)
    with pytest.raises(InvalidArgumentError, match="DECONVD_TARGET"):
        ours(x)
    monkeypatch.setenv("DECONVD_TARGET", server.target)
    torch.testing.assert_close(ours(x), theirs(x))
    other = pickle.loads(pickle.dumps(ours))
    assert other.connection is ours.connection


def test_layers_of_a_module_are_replaced(F: Connection) -> None:
    block = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, stride=2), torch.nn.ReLU())
    net = torch.nn.Sequential(block, torch.nn.ConvTranspose2d(6, 2, 3, output_padding=1, stride=2))
    x = images(2, 4, 5, 6).float()
    expected = net(x)
    parameters = [*net.parameters()]

    assert replace_layers(net.eval(), F) is net
    assert isinstance(block[0], ConvTranspose2d)
    assert not block[0].training
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)
    alone: Any = replace_layers(torch.nn.ConvTranspose2d(4, 6, 3), F)
    assert alone.connection is F


def test_a_layer_in_two_places_stays_one_layer(F: Connection) -> None:
    layer = torch.nn.ConvTranspose2d(4, 4, 3)
    net = torch.nn.ModuleDict({"first": layer, "block": torch.nn.Sequential(layer)})
    replace_layers(net, F)
    assert isinstance(net["first"], ConvTranspose2d)
    assert net["block"].get_submodule("0") is net["first"]


def test_hooks_and_pruning_are_kept(F: Connection) -> None:
    layer = torch.nn.ConvTranspose2d(4, 6, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    seen: list[Any] = []
    hook = layer.register_forward_hook(lambda *_: seen.append("called"))
    x = images(2, 4, 5, 6).float()
    expected = layer(x)
    net = replace_layers(torch.nn.Sequential(layer), F)

    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)
    assert seen == ["called", "called"]
    hook.remove()
    net(x)
    assert len(seen) == 2
    assert {name for name, _ in net.named_parameters()} == {"0.bias", "0.weight_orig"}
    net.get_submodule("0").bias = None
    assert layer.bias is not None


@pytest.mark.parametrize("last", ["input", "weight"])
def test_channels_last_comes_out_as_of_torchs_layer(F: Connection, last: str) -> None:
    ours, theirs = pair(F, kernel_size=3)
    x = images(2, 4, 5, 6)
    if last == "input":
        x = x.to(memory_format=torch.channels_last)
    else:
        ours, theirs = (layer.to(memory_format=torch.channels_last) for layer in (ours, theirs))
    for layer in (ours, theirs):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layers_are_mapped_by_vmap(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3)
    batches = images(2, 3, 4, 5, 6)
    torch.testing.assert_close(
        torch.func.vmap(ours, 1)(batches), torch.func.vmap(theirs, 1)(batches)
    )


def test_what_is_no_tensor_no_module_or_no_connection_is_named(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3)
    wrong: Any = np.ones((1, 4, 5, 6))
    with pytest.raises(InvalidArgumentError, match="input must be a torch tensor, got ndarray"):
        ours(wrong)
    for make in (
        lambda target: ConvTranspose2d(4, 6, 3, connection=target),
        lambda target: replace_layers(torch.nn.Sequential(theirs), target),
    ):
        with pytest.raises(InvalidArgumentError, match=r"connection must be a Connection.*got str"):
            make("unix:deconvd.sock")
    with pytest.raises(InvalidArgumentError, match=r"module must be a torch\.nn\.Module, got int"):
        replace_layers(1, F)
    with pytest.raises(ValueError, match="output_size must have 2 or 3 elements"):
        ours(images(4, 5, 6), [1, 1, 4, 7, 8])


class Images(torch.utils.data.Dataset[torch.Tensor]):
    """Images that a layer enlarges in the worker that loads them."""

    def __init__(self, layer: ConvTranspose2d) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((4, 5, 6), float(index), dtype=torch.float64))


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_of_a_data_loader_use_layers(F: Connection, start: str) -> None:
    ours, theirs = pair(F, kernel_size=3)
    ours(images(1, 4, 5, 6))  # the connection is in use
    loader = torch.utils.data.DataLoader(
        Images(ours), batch_size=2, num_workers=1, multiprocessing_context=start
    )
    batches = torch.cat(list(loader))
    x = torch.arange(4.0, dtype=torch.float64).view(-1, 1, 1, 1).expand(4, 4, 5, 6)
    torch.testing.assert_close(batches, theirs(x).detach())


def test_threads_train_at_once(F: Connection) -> None:
    ours, theirs = pair(F, kernel_size=3, stride=2)

    def train(index: int) -> torch.Tensor:
        x = torch.full((1, 4, 5, 6), float(index), dtype=torch.float64)
        return torch.autograd.grad(ours(x).square().sum(), ours.weight)[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, range(12)))
    for index, gradient in enumerate(found):
        x = torch.full((1, 4, 5, 6), float(index), dtype=torch.float64)
        (expected,) = torch.autograd.grad(theirs(x).square().sum(), theirs.weight)
        torch.testing.assert_close(gradient, expected)


def test_a_closed_connection_says_so(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as connection:
        ours, _ = pair(connection, kernel_size=3)
        ours(images(1, 4, 5, 6))
    with pytest.raises(deconvd_client.CallCancelledError):
        ours(images(1, 4, 5, 6))
