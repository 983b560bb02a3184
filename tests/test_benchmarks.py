"""What benchmarks compare us with must compute the same."""

from __future__ import annotations

import numpy as np

from benchmarks.layers import LAYERS
from benchmarks.stock import stock_service
from deconvd_client import Connection


def test_the_stock_service_computes_what_ours_does(F: Connection) -> None:
    (layer,) = (layer for layer in LAYERS if layer.name == "dilated 64-64 32 k3 s2 d2")
    problem = layer.problem(np.dtype(np.float32))
    generator = np.random.default_rng(0)
    x, W = (generator.standard_normal(s.shape, np.float32) for s in (problem.x, problem.W))

    with stock_service("cpu") as stock:
        y = stock(layer, x, W)

    expected = F.deconvolution_2d(x, W, None, layer.stride, layer.pad, dilate=layer.dilate)
    # sums of 1,000 products of magnitude 1, in another order where slices are cut in another way
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
