"""Trains the decoder of `examples.train_decoder` in JAX: a compiled step calls the server, forward and backward.

Run it with ``python -m examples.decoder_jax --target HOST:PORT``. It prints the same losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.example_libraries import optimizers

from deconvd_client import Connection
from examples.command_line import open_connection, output_option, report_errors, target_option
from examples.pictures import save
from examples.train_decoder import (
    BATCH_SIZE,
    LEARNING_RATE,
    REPORT_STEPS,
    SEED,
    Autoencoder,
    Digits,
    digits_picture,
    steps_option,
)

__all__ = ["main", "reconstruct", "train"]


def reconstruct(F: Connection, parameters: Sequence[Any], images: Any) -> Any:
    """Return the images that the decoder draws from the codes of `images`."""
    matrix, W_first, b_first, W_second, b_second = parameters
    code = (images.reshape(len(images), -1) @ matrix)[:, :, None, None]
    hidden = jax.nn.relu(F.deconvolution_2d(code, W_first, b_first))
    return jax.nn.sigmoid(F.deconvolution_2d(hidden, W_second, b_second, stride=2, pad=1))


def train(F: Connection, images: Any, steps_count: int) -> list[Any]:
    """Train on random batches of `images`, print the mean loss now and then, and return the parameters."""

    def loss(parameters: Sequence[Any], batch: Any) -> Any:
        return jnp.mean((reconstruct(F, parameters, batch) - batch) ** 2)

    initialize, update, parameters_of = optimizers.adam(LEARNING_RATE)

    @jax.jit  # type: ignore[untyped-decorator]  # jax is not there for type checkers
    def step(number: int, state: Any, batch: Any) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(loss)(parameters_of(state), batch)
        return value, update(number, gradients, state)

    rng = np.random.default_rng(SEED)
    state = initialize(Autoencoder(F).parameters)
    losses: list[float] = []
    for number in range(steps_count):
        value, state = step(number, state, rng.choice(images, BATCH_SIZE))
        losses.append(float(value))
        if number == 0 or (number + 1) % REPORT_STEPS == 0:
            click.echo(f"  step {number + 1:4}: loss {np.mean(losses[-REPORT_STEPS:]):.4f}")
    return list(parameters_of(state))


@click.command()
@target_option
@output_option
@steps_option
def main(target: str, folder: Path, steps_count: int) -> None:
    """Train an autoencoder of digits in JAX, with two deconvolution layers on the server."""
    digits = Digits.load()
    with report_errors(), open_connection(target) as F:
        with F.using_config("cudnn_deterministic", True):  # so that each run prints the same losses
            parameters = train(F, digits.training, steps_count)
        drawn = np.asarray(reconstruct(F, parameters, jnp.asarray(digits.shown)))
        save(digits_picture(digits.shown, drawn), folder / "digits-jax.png")


if __name__ == "__main__":
    main()
