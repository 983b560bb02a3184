"""Torch's tensors on a card: they stay there, and the results have the bits that numpy's have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deconvd_client import Connection

pytestmark = pytest.mark.gpu

torch: Any = pytest.importorskip("torch")
cupy: Any = pytest.importorskip("cupy")

GEOMETRY: dict[str, Any] = {"stride": 2, "pad": 1}


def operands(dtype: Any) -> list[Any]:
    """Return x, W and b on the host."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in ((3, 16, 24, 24), (16, 8, 4, 4), (8,))]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_on_a_card_stay_there_and_have_the_same_bits(card_F: Connection, name: str) -> None:
    from deconvd_client.frameworks.torch_tensors import array_of

    host = operands(getattr(torch, name))
    card = [tensor.cuda() for tensor in host]
    arrays = [array_of(tensor) for tensor in host]

    for tensor in card:
        shared = array_of(tensor)
        assert isinstance(shared, cupy.ndarray)
        assert shared.data.ptr == tensor.data_ptr()
    y: Any = card_F.deconvolution_2d(card[0], card[1], card[2], **GEOMETRY)
    assert y.device == card[0].device
    expected = card_F.deconvolution_2d(arrays[0], arrays[1], arrays[2], **GEOMETRY)
    np.testing.assert_array_equal(array_of(y.cpu()), expected)

    inputs = [tensor.requires_grad_() for tensor in card]
    recorded: Any = card_F.deconvolution_2d(inputs[0], inputs[1], inputs[2], **GEOMETRY)
    with card_F.using_config("cudnn_deterministic", True):
        gradients = card_F.deconvolution_2d_grad(
            arrays[0], arrays[1], arrays[2], expected, **GEOMETRY
        )
        found = card_F.deconvolution_2d_grad(
            card[0].detach(), card[1].detach(), card[2].detach(), y, **GEOMETRY
        )
    for ours, theirs in zip(found, gradients, strict=True):
        assert isinstance(ours, torch.Tensor)
        assert ours.is_cuda
        np.testing.assert_array_equal(array_of(ours.cpu()), theirs)
    # backward runs in a thread of torch's own, so with the default options
    for gradient, theirs in zip(torch.autograd.grad(recorded, inputs, y), gradients, strict=True):
        assert gradient.is_cuda
        reference = torch.from_numpy(np.asarray(theirs, np.float64))
        scale = float(reference.abs().max())
        torch.testing.assert_close(
            gradient.cpu().double() / scale, reference / scale, atol=1e-2, rtol=0
        )


def test_a_call_waits_for_what_the_current_stream_of_torch_computes(card_F: Connection) -> None:
    x, W, _ = (tensor.cuda() for tensor in operands(torch.float32))
    expected: Any = card_F.deconvolution_2d(x * 2, W, **GEOMETRY)
    with torch.cuda.stream(torch.cuda.Stream()):
        late = x.clone()
        for _ in range(200):
            late = late @ torch.eye(24, device="cuda")
        y: Any = card_F.deconvolution_2d(late * 2, W, **GEOMETRY) + 0
        torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(y, expected)


def test_a_layer_trains_on_the_card_as_torchs_own(card_F: Connection) -> None:
    from deconvd_client.torch import ConvTranspose2d

    ours = ConvTranspose2d(4, 6, 4, 2, 1, device="cuda", dtype=torch.float64, connection=card_F)
    theirs = torch.nn.ConvTranspose2d(4, 6, 4, 2, 1, device="cuda", dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, device="cuda", dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()])
    expected = torch.autograd.grad(theirs(x).square().sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(found, expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ours.float()(x.float()).dtype is torch.bfloat16
