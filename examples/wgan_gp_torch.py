"""Trains a WGAN with gradient penalty in torch, whose deconvolution layers run on the server, to second derivatives.

Run it with ``python -m examples.wgan_gp_torch --target HOST:PORT``. It learns to draw bright spots on a dark ground.
From I. Gulrajani et al., "Improved training of Wasserstein GANs" (NeurIPS 2017), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import click
import torch
from torch import nn
from torch.nn import functional

import deconvd_client.torch
from examples.command_line import open_connection, report_errors, target_option

__all__ = ["Losses", "Networks", "main", "train"]

IMAGE_SIZE: Final = 8
LATENT_SIZE: Final = 16
BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 2e-3
PENALTY_WEIGHT: Final = 10.0
CRITIC_STEPS: Final = 3
"""Steps of the critic for one of the generator."""

REPORT_STEPS: Final = 10
SEED: Final = 0

Deconvolution = Callable[..., nn.Module]
"""Makes a layer from the arguments of `torch.nn.ConvTranspose2d`."""


class Losses(NamedTuple):
    """What a step of both networks has measured.

    Attributes:
        critic: The loss that the critic minimizes: minus its estimate of the distance, and the penalty.
        penalty: The part of it for gradients whose length is not 1.
        error: Mean squared difference of the mean images of both kinds: what the generator has not learned.
    """

    critic: float
    penalty: float
    error: float


class Networks:
    """The generator and the critic, with their optimizers.

    Args:
        deconvolution: Makes the deconvolution layers: `deconvd_client.torch.ConvTranspose2d` with its connection, or
            `torch.nn.ConvTranspose2d`.

    A deconvolution of stride 1 is a convolution with a turned filter. So the critic has no layers of another kind,
    and the penalty, a gradient of a gradient, goes through the server.
    """

    def __init__(self, deconvolution: Deconvolution) -> None:
        self.generator = nn.Sequential(
            nn.Unflatten(1, (LATENT_SIZE, 1, 1)),
            deconvolution(LATENT_SIZE, 32, 4),
            nn.ReLU(),
            deconvolution(32, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        self.critic = nn.Sequential(
            deconvolution(1, 16, 5, padding=2),
            nn.Softplus(),
            nn.AvgPool2d(2),
            deconvolution(16, 32, 3, padding=1),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(32 * (IMAGE_SIZE // 2) ** 2, 1),
        )
        self._optimizers = {
            network: torch.optim.Adam(network.parameters(), LEARNING_RATE, betas=(0.0, 0.9))
            for network in (self.generator, self.critic)
        }

    def step(self) -> Losses:
        """Train the critic a few times, then the generator once."""
        for _ in range(CRITIC_STEPS):
            real, drawn = spots(BATCH_SIZE), self.draw(BATCH_SIZE).detach()
            penalty = self._penalty(real, drawn)
            critic_loss = self.critic(drawn).mean() - self.critic(real).mean() + penalty
            self._descend(self.critic, critic_loss)
        images = self.draw(BATCH_SIZE)
        self._descend(self.generator, -self.critic(images).mean())
        error = functional.mse_loss(images.detach().mean(0), spots(1024).mean(0))
        return Losses(critic_loss.item(), penalty.item(), error.item())

    def draw(self, count: int) -> Any:
        """Return images that the generator draws."""
        return self.generator(torch.randn(count, LATENT_SIZE))

    def _penalty(self, real: Any, drawn: Any) -> Any:
        """Return the loss for gradients of the critic, between real and drawn images, whose length is not 1."""
        share = torch.rand(len(real), 1, 1, 1)
        between = (share * real + (1 - share) * drawn).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return PENALTY_WEIGHT * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def _descend(self, network: nn.Module, loss: Any) -> None:
        optimizer = self._optimizers[network]
        optimizer.zero_grad()
        loss.backward(inputs=list(network.parameters()))
        optimizer.step()


def spots(count: int) -> Any:
    """Return images of a bright spot each, near the middle: ``(count, 1, 8, 8)``, from 0 to 1."""
    centre = (IMAGE_SIZE - 1) / 2 + torch.rand(count, 2, 1, 1) - 0.5
    row = torch.arange(float(IMAGE_SIZE)).view(1, -1, 1)
    column = torch.arange(float(IMAGE_SIZE)).view(1, 1, -1)
    distance = (row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2
    return torch.exp(-distance / 4).unsqueeze(1)


def train(deconvolution: Deconvolution, steps_count: int) -> list[Losses]:
    """Train new networks, print what is measured, and return it for each step."""
    torch.manual_seed(SEED)
    networks = Networks(deconvolution)
    losses = []
    for step in range(1, steps_count + 1):
        losses.append(networks.step())
        if step == 1 or step % REPORT_STEPS == 0:
            critic, penalty, error = losses[-1]
            click.echo(
                f"  step {step:3}: critic's loss {critic:8.4f}, of which penalty {penalty:7.4f}; "
                f"error of the mean image {error:.4f}"
            )
    return losses


@click.command()
@target_option
@click.option("--steps", "steps_count", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--local", is_flag=True, help="Compute with torch's own layers, to compare.")
def main(target: str, steps_count: int, local: bool) -> None:
    """Train a WGAN-GP whose deconvolution layers are on the server."""
    torch.set_num_threads(1)  # so little is computed here that more of them would only wait
    if local:
        train(nn.ConvTranspose2d, steps_count)
        return
    with report_errors(), open_connection(target) as F:
        train(partial(deconvd_client.torch.ConvTranspose2d, connection=F), steps_count)


if __name__ == "__main__":
    main()
