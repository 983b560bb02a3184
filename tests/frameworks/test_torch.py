"""Torch's tensors in a connection's functions, and what autograd makes of the calls."""

from __future__ import annotations

import gc
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import deconvd_client
import deconvd_client.torch
from deconvd.model.dtypes import BFLOAT16
from deconvd_client import Connection, InvalidArgumentError
from deconvd_client.frameworks.torch_tensors import array_of
from tests.processes import wait_until
from tests.servers import ServerProcess

ELEMENT_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCES = {
    torch.float16: {"atol": 5e-3, "rtol": 5e-2},
    torch.bfloat16: {"atol": 5e-2, "rtol": 5e-2},
    torch.float32: {"atol": 1e-5, "rtol": 1e-4},
    torch.float64: {"atol": 1e-12, "rtol": 1e-10},
}
"""Those of the reference; bfloat16 has 8 bits of mantissa, three fewer than float16."""

GEOMETRY: dict[str, Any] = {"stride": (2, 1), "pad": (1, 0), "outsize": (9, None), "groups": 2}


def operands(dtype: torch.dtype = torch.float64, *, recorded: bool = True) -> list[torch.Tensor]:
    """Return x, W and b."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 4, 5), (4, 2, 4, 3), (4,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_(recorded) for tensor in tensors]


def small_operands() -> list[torch.Tensor]:
    """Return x, W and b for checks that make a call for each element."""
    shapes = [(1, 2, 4, 1), (2, 1, 4, 1), (2,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def torchs(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Return what torch's own operator computes for `GEOMETRY`."""
    return torch.nn.functional.conv_transpose2d(
        x, W, b, stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2
    )


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = torch.autograd.grad(y.square().sum(), inputs)
    return found


@pytest.fixture
def far(server: ServerProcess) -> Iterator[Connection]:
    """A connection to the shared server that lends it no memory, so that the server keeps activations."""
    with deconvd_client.connect(server.target, transport="unix") as connection:
        yield connection


def kept_count(F: Connection) -> int:
    """Return how many tensors the server keeps for a connection."""
    (device,) = F.server_info().devices
    return sum(cache.count for cache in device.caches if cache.name == "resident tensors")


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_results_are_torchs(F: Connection, dtype: torch.dtype) -> None:
    inputs = operands(dtype)
    y: Any = F.deconvolution_2d(*inputs, **GEOMETRY)
    expected = torchs(*inputs)

    assert (y.dtype, y.device) == (dtype, expected.device)
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(y, inputs, gy)
    # torch sums gradients of narrow types in that type, we do in float32: so the reference is its wider result
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for found, reference in zip(
        ours, torch.autograd.grad(torchs(*wide), wide, gy.double()), strict=True
    ):
        torch.testing.assert_close(found, reference.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_without_autograd_the_same_bits_come_back_as_with_numpy(
    F: Connection, dtype: torch.dtype
) -> None:
    x, W, b = operands(dtype, recorded=False)
    arrays: list[Any] = [array_of(tensor) for tensor in (x, W, b)]
    y: Any = F.deconvolution_2d(x, W, b, **GEOMETRY)
    expected = F.deconvolution_2d(*arrays, **GEOMETRY)

    assert y.dtype is dtype
    assert y.grad_fn is None
    np.testing.assert_array_equal(array_of(y), expected)
    found: Any = F.deconvolution_2d_grad(x, W, b, y, **GEOMETRY)
    for ours, theirs in zip(
        found,
        F.deconvolution_2d_grad(arrays[0], arrays[1], arrays[2], expected, **GEOMETRY),
        strict=True,
    ):
        np.testing.assert_array_equal(array_of(ours), theirs)
    _, pullback = F.vjp(x, W, b, **GEOMETRY)
    with pullback:
        assert isinstance(pullback(y).gx, torch.Tensor)
    with F.put(x) as there:
        np.testing.assert_array_equal(there.numpy(), arrays[0])
    np.testing.assert_array_equal(F.remote.deconvolution_2d(x, W, b, **GEOMETRY).numpy(), expected)


def test_tensors_of_the_host_share_their_memory() -> None:
    for dtype in ELEMENT_TYPES:
        tensor = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        array = array_of(tensor)
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
    assert array_of(torch.ones(2, dtype=torch.bfloat16)).dtype == BFLOAT16


def test_any_strides_are_taken(F: Connection) -> None:
    x, W, b = operands(recorded=False)
    expected: Any = F.deconvolution_2d(x, W, b, **GEOMETRY)
    layouts = [
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.complex(torch.zeros_like(x), -x)
        .conj()
        .imag,  # its elements are negated when they are read
    ]
    for same in layouts:
        y: Any = F.deconvolution_2d(same, W, b, **GEOMETRY)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = F.deconvolution_2d(one.expand(2, 4, 4, 5), W, b, **GEOMETRY)
    torch.testing.assert_close(y, torchs(one.expand(2, 4, 4, 5), W, b))


def test_unused_recording_is_no_recording(F: Connection) -> None:
    inputs = operands()
    with torch.no_grad():
        y: Any = F.deconvolution_2d(*inputs, **GEOMETRY)
    assert not y.requires_grad
    with F.put(inputs[0]) as there:  # what stays on the server takes no part in autograd
        z = F.deconvolution_2d(there, inputs[1].detach(), **GEOMETRY)
    assert isinstance(z, np.ndarray)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), "x must have one of .* got torch.int64"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.complex64), "x must have one of .*torch.complex64"),
        (torch.zeros(1, 1, 2, 2).to_sparse(), r"x must be a dense tensor, got .*to_dense\(\)"),
        (torch.zeros(1, 1, 2, 2, device="meta"), "x must have elements, got .* meta"),
    ],
)
def test_other_tensors_are_refused_by_name(F: Connection, tensor: torch.Tensor, match: str) -> None:
    W: Any = torch.zeros(1, 1, 2, 2)
    x: Any = tensor
    with pytest.raises(InvalidArgumentError, match=match) as refusal:
        F.deconvolution_2d(x, W)
    assert refusal.value.argument == "x"
    with pytest.raises(InvalidArgumentError, match=match):
        F.deconvolution_2d(x, W.requires_grad_())


def test_gradients_are_right_to_the_second_order(F: Connection) -> None:
    def call(*inputs: Any) -> Any:
        return F.deconvolution_2d(*inputs, **GEOMETRY)

    assert torch.autograd.gradcheck(call, small_operands())
    assert torch.autograd.gradgradcheck(call, small_operands())


def test_the_gradients_function_is_differentiable_too(F: Connection) -> None:
    x, W, b = small_operands()
    gy = torch.randn(torchs(x, W).shape, dtype=torch.float64, requires_grad=True)

    def call(x: Any, W: Any, gy: Any) -> Any:
        return tuple(F.deconvolution_2d_grad(x, W, b.detach(), gy, **GEOMETRY))

    assert torch.autograd.gradcheck(call, (x, W, gy))
    assert torch.autograd.gradgradcheck(call, (x, W, gy))


def test_third_derivatives_are_torchs(F: Connection) -> None:
    def third(call: Any) -> torch.Tensor:
        inputs = operands()
        y = call(*inputs).pow(4).sum()
        (first,) = torch.autograd.grad(y, inputs[1], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), inputs[1])[0]

    # with output_padding, torch's own third derivative fails
    ours = third(lambda x, W, b: F.deconvolution_2d(x, W, b, 2, 1, groups=2))
    expected = third(lambda *inputs: torch.nn.functional.conv_transpose2d(*inputs, 2, 1, groups=2))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("recorded", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_what_is_needed_is_computed(F: Connection, recorded: tuple[int, ...]) -> None:
    def result(call: Any) -> tuple[torch.Tensor, ...]:
        inputs = operands(recorded=False)
        for index in recorded:
            inputs[index].requires_grad_()
        return gradients(call(*inputs), [inputs[index] for index in recorded])

    ours = result(lambda *inputs: F.deconvolution_2d(*inputs, **GEOMETRY))
    torch.testing.assert_close(ours, result(torchs))


def test_operands_of_other_kinds_are_constants(F: Connection) -> None:
    x, W, b = operands()
    expected = torchs(x, W, b)
    with F.put(W) as there:
        for other in (there, W.detach().numpy(), W.detach()):
            y: Any = F.deconvolution_2d(x, other, b, **GEOMETRY)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(gradients(y, [x]), gradients(torchs(x, W, b), [x]))
    y = F.deconvolution_2d(x.detach().numpy(), W, b, **GEOMETRY)
    torch.testing.assert_close(gradients(y, [W]), gradients(torchs(x, W, b), [W]))


def test_a_size_for_one_axis_takes_operands_of_every_kind(F: Connection) -> None:
    x, W, b = operands()
    lists: Any = W.tolist()
    y: Any = F.deconvolution_2d(x, lists, b, **GEOMETRY)
    torch.testing.assert_close(y, torchs(x, W, b))
    nothing: Any = None
    with pytest.raises(InvalidArgumentError, match="x must be an array") as refusal:
        F.deconvolution_2d(nothing, W, b, **GEOMETRY)
    assert refusal.value.argument == "x"
    flat: Any = x[0]
    with pytest.raises(InvalidArgumentError, match="x must have 4 dimensions"):
        F.deconvolution_2d(flat, W, b, **GEOMETRY)


def test_batches_of_gradients_are_torchs(F: Connection) -> None:
    """`is_grads_batched` and `vectorize` use a vmap of torch's own that is older than torch.func."""
    x, W, b = operands()

    def found(call: Any) -> list[torch.Tensor]:
        y = call(x, W, b)
        gys = torch.stack([torch.ones_like(y), y.detach()])
        firsts = torch.autograd.grad(
            y, [x, W], gys, is_grads_batched=True, create_graph=True, retain_graph=True
        )
        (second,) = torch.autograd.grad(
            firsts[0], W, torch.ones(3, *firsts[0].shape).double(), is_grads_batched=True
        )
        jacobian = torch.autograd.functional.jacobian(
            lambda b: call(x, W, b).square().sum((0, 2, 3)), b, vectorize=True
        )
        return [*firsts, second, jacobian]

    ours = found(lambda *inputs: F.deconvolution_2d(*inputs, **GEOMETRY))
    torch.testing.assert_close(ours, found(torchs))


def test_the_lines_of_the_readme_work(F: Connection) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"\n    import deconvd_client\.torch\n\n((?:    .+\n)+)", readme)
    net = torch.nn.Sequential(torch.nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1))
    x = torch.randn(1, 64, 3, 3)
    expected = net(x)
    names: dict[str, Any] = {"F": F, "net": net, "deconvd_client": deconvd_client}
    exec(textwrap.dedent(lines), names)

    torch.testing.assert_close(names["net"](x), expected, **TOLERANCES[torch.float32])
    names["layer"].load_state_dict(net[0].state_dict())
    torch.testing.assert_close(names["layer"](x), expected, **TOLERANCES[torch.float32])


def test_a_change_in_place_after_the_call_raises_as_torchs_own(F: Connection) -> None:
    for index in (0, 1):
        inputs = operands()
        y: Any = F.deconvolution_2d(*inputs, **GEOMETRY)
        with torch.no_grad():
            inputs[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    inputs = operands()
    y = F.deconvolution_2d(*inputs, **GEOMETRY)
    with torch.no_grad():
        inputs[2].add_(1)  # no gradient needs b
    y.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_rather_than_lost(F: Connection) -> None:
    x, W, b = operands(recorded=False)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        F.deconvolution_2d(forward_ad.make_dual(x, x), W, b, **GEOMETRY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_torchs_layer(F: Connection, dtype: torch.dtype) -> None:
    inputs = operands(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y: Any = F.deconvolution_2d(*inputs, **GEOMETRY)
        without: Any = F.deconvolution_2d(*operands(torch.float32, recorded=False), **GEOMETRY)
        wide: Any = F.deconvolution_2d(*operands(torch.float64), **GEOMETRY)
        expected = torchs(*inputs)
    assert (y.dtype, without.dtype, wide.dtype) == (dtype, dtype, torch.float64)
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    assert [gradient.dtype for gradient in gradients(y, inputs)] == [torch.float32] * 3


def large_operands() -> tuple[Any, Any]:
    x = torch.randn(2, 8, 128, 128, dtype=torch.float64, requires_grad=True)  # 2 MiB
    W = torch.randn(8, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    return x, W


def test_activations_stay_on_the_server_as_long_as_the_graph(far: Connection) -> None:
    x, W = large_operands()
    y: Any = far.deconvolution_2d(x, W, stride=2)
    assert kept_count(far) == 2
    expected = gradients(torch.nn.functional.conv_transpose2d(x, W, stride=2), [x, W])

    y.square().sum().backward(retain_graph=True)
    assert kept_count(far) == 2
    torch.testing.assert_close((x.grad, W.grad), expected)
    torch.testing.assert_close(gradients(y, [x, W]), expected)
    # torch has freed what it saved, so the server has too, though y is still there
    wait_until(lambda: kept_count(far) == 0)

    y = far.deconvolution_2d(x, W, stride=2)
    assert kept_count(far) == 2
    del y
    gc.collect()
    wait_until(lambda: kept_count(far) == 0)


def test_a_checkpoint_keeps_nothing_on_the_server(far: Connection) -> None:
    x, W = large_operands()
    expected = gradients(torch.nn.functional.conv_transpose2d(x, W, stride=2), [x, W])

    def call(x: Any, W: Any) -> Any:
        return far.deconvolution_2d(x, W, stride=2)

    for use_reentrant in (False, True):
        y: Any = checkpoint(call, x, W, use_reentrant=use_reentrant)
        wait_until(lambda: kept_count(far) == 0)
        x.grad = W.grad = None
        y.square().sum().backward()
        torch.testing.assert_close((x.grad, W.grad), expected)
        wait_until(lambda: kept_count(far) == 0)


def test_tensors_saved_elsewhere_are_sent_again(far: Connection) -> None:
    x, W = large_operands()
    expected = gradients(torch.nn.functional.conv_transpose2d(x, W, stride=2), [x, W])
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
        y: Any = far.deconvolution_2d(x, W, stride=2)
    wait_until(lambda: kept_count(far) == 0)
    torch.testing.assert_close(gradients(y, [x, W]), expected)


def test_second_derivatives_with_activations_on_the_server_are_torchs(far: Connection) -> None:
    x, W = large_operands()

    def second(call: Any) -> Any:
        (gx,) = torch.autograd.grad(call(x, W).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), [x, W])

    ours = second(lambda x, W: far.deconvolution_2d(x, W, stride=2))
    expected = second(lambda x, W: torch.nn.functional.conv_transpose2d(x, W, stride=2))
    torch.testing.assert_close(ours, expected)
    wait_until(lambda: kept_count(far) == 0)


def test_with_shared_memory_or_a_frozen_filter_nothing_is_kept(
    F: Connection, far: Connection
) -> None:
    x, W = large_operands()
    near: Any = F.deconvolution_2d(x, W, stride=2)
    assert F.shares_memory
    assert kept_count(F) == 0
    frozen: Any = far.deconvolution_2d(x, W.detach(), stride=2)
    assert not far.shares_memory
    assert kept_count(far) == 0
    near.sum().backward()
    frozen.sum().backward()
