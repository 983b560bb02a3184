"""The decoder in torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import deconvd_client.torch
from benchmarks.frameworks.decoder import LEARNING_RATE, FrameworkCalls, Workload
from deconvd_client import Connection

__all__ = ["local_calls", "remote_calls"]


def remote_calls(F: Connection, workload: Workload) -> FrameworkCalls:
    """Return the work by layers of ours."""
    return _calls(partial(deconvd_client.torch.ConvTranspose2d, connection=F), workload)


def local_calls(workload: Workload) -> FrameworkCalls:
    """Return the work by torch's own layers."""
    return _calls(torch.nn.ConvTranspose2d, workload)


def _calls(layer: Any, workload: Workload) -> FrameworkCalls:
    # After an operator, torch's other threads spin on the processors that the server and the other ways need.
    torch.set_num_threads(1)
    decoder = torch.nn.Sequential(
        layer(16, 32, 4), torch.nn.ReLU(), layer(32, 1, 4, stride=2, padding=1), torch.nn.Sigmoid()
    )
    parameters = list(decoder.parameters())
    codes, images = torch.from_numpy(workload.codes), torch.from_numpy(workload.images)
    with torch.no_grad():
        for parameter, value in zip(parameters, workload.parameters, strict=True):
            parameter.copy_(torch.from_numpy(value))

    def step() -> Any:
        loss = torch.nn.functional.mse_loss(decoder(codes), images)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=LEARNING_RATE)
        return loss.item()

    def infer() -> Any:
        with torch.no_grad():
            return decoder(codes).numpy()

    return FrameworkCalls(step, infer)
