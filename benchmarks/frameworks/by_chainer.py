"""The decoder in Chainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chainer

from benchmarks.frameworks.decoder import LEARNING_RATE, STRIDE_PAD, FrameworkCalls, Workload
from deconvd_client import Connection

__all__ = ["local_calls", "remote_calls"]


def remote_calls(F: Connection, workload: Workload) -> FrameworkCalls:
    """Return the work by calls of ours."""
    return _calls(F.deconvolution_2d, workload)


def local_calls(workload: Workload) -> FrameworkCalls:
    """Return the work by Chainer's own function."""
    return _calls(chainer.functions.deconvolution_2d, workload)


def _calls(deconvolution_2d: Callable[..., Any], workload: Workload) -> FrameworkCalls:
    functions = chainer.functions
    parameters = [chainer.Parameter(p.copy()) for p in workload.parameters]
    W_first, b_first, W_second, b_second = parameters
    # a Variable, since Chainer's function fails where gW is wanted and gx is not
    codes = chainer.Variable(workload.codes)

    def decode() -> Any:
        hidden = functions.relu(deconvolution_2d(codes, W_first, b_first, *STRIDE_PAD[0]))
        return functions.sigmoid(deconvolution_2d(hidden, W_second, b_second, *STRIDE_PAD[1]))

    def step() -> float:
        loss = functions.mean_squared_error(decode(), workload.images)
        for parameter in parameters:
            parameter.cleargrad()
        codes.cleargrad()
        loss.backward()
        for parameter in parameters:
            parameter.array -= LEARNING_RATE * parameter.grad
        return float(loss.array)

    def infer() -> Any:
        with chainer.no_backprop_mode():
            return decode().array

    return FrameworkCalls(step, infer)
