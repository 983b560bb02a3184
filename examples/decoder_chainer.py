"""Trains the decoder of `examples.train_decoder` by Chainer's own links, which `install` routes to the server.

Run it with ``python -m examples.decoder_chainer --target HOST:PORT``. It prints the same losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chainer
import chainer.functions
import chainer.links
import click
import numpy as np

import deconvd_client.chainer
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

__all__ = ["Decoder", "main", "train"]


class Decoder(chainer.Chain):  # type: ignore[misc]  # Chainer has no types
    """The autoencoder, of Chainer's links. Nothing here knows of a server.

    Args:
        first: Initial values of the parameters, in the order of `Autoencoder.parameters`.
    """

    def __init__(self, first: list[Any]) -> None:
        super().__init__()
        matrix, W_first, b_first, W_second, b_second = first
        links = chainer.links
        with self.init_scope():
            self.encode = links.Linear(*matrix.shape, nobias=True, initialW=matrix.T)
            self.first = links.Deconvolution2D(
                *W_first.shape[:3], initialW=W_first, initial_bias=b_first
            )
            self.second = links.Deconvolution2D(
                *W_second.shape[:3], stride=2, pad=1, initialW=W_second, initial_bias=b_second
            )

    def forward(self, images: Any) -> Any:
        """Return the images that the decoder draws from the codes of `images`."""
        code = self.encode(images)[:, :, None, None]
        hidden = chainer.functions.relu(self.first(code))
        return chainer.functions.sigmoid(self.second(hidden))


def train(decoder: Decoder, images: Any, steps_count: int) -> None:
    """Train on random batches of `images`, and print the mean loss now and then."""
    rng = np.random.default_rng(SEED)
    optimizer = chainer.optimizers.Adam(alpha=LEARNING_RATE).setup(decoder)
    losses: list[float] = []
    for step in range(1, steps_count + 1):
        batch = rng.choice(images, BATCH_SIZE)
        loss = chainer.functions.mean_squared_error(decoder(batch), batch)
        decoder.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(float(loss.array))
        if step == 1 or step % REPORT_STEPS == 0:
            click.echo(f"  step {step:4}: loss {np.mean(losses[-REPORT_STEPS:]):.4f}")


def run(F: Connection, folder: Path, steps_count: int) -> None:
    """Train on digits, and save a picture of digits that were not in the training set."""
    digits = Digits.load()
    decoder = Decoder(Autoencoder(F).parameters)
    with (
        deconvd_client.chainer.install(F),
        chainer.using_config(
            "cudnn_deterministic", True
        ),  # so that each run prints the same losses
    ):
        train(decoder, digits.training, steps_count)
        drawn = decoder(digits.shown).array
    save(digits_picture(digits.shown, drawn), folder / "digits-chainer.png")


@click.command()
@target_option
@output_option
@steps_option
def main(target: str, folder: Path, steps_count: int) -> None:
    """Train an autoencoder of digits in Chainer, with two deconvolution layers on the server."""
    with report_errors(), open_connection(target) as F:
        run(F, folder, steps_count)


if __name__ == "__main__":
    main()
