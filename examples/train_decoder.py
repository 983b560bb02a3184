"""Trains an autoencoder whose decoder is two deconvolution layers that run on the server, forward and backward.

Run it with ``python -m examples.train_decoder --target HOST:PORT``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from deconvd_client import Connection
from examples.command_line import open_connection, output_option, report_errors, target_option
from examples.pictures import Array, column, from_grey_levels, magnify, row, save

__all__ = [
    "Autoencoder",
    "Digits",
    "digits_picture",
    "main",
    "run",
    "steps_option",
    "train",
]

CODE_SIZE: Final = 16
HIDDEN_CHANNELS: Final = 32
BATCH_SIZE: Final = 16
LEARNING_RATE: Final = 0.01
SEED: Final = 0
TRAINING_COUNT: Final = 1500
REPORT_STEPS: Final = 100


class Digits(NamedTuple):
    """Images of handwritten digits, white on black: float32 from 0 to 1, ``(n, 1, 8, 8)``.

    Attributes:
        training: 1500 to train on.
        unseen: 297 others.
        shown: Ten of the unseen ones: a 0, a 1, and so on.
    """

    training: Array
    unseen: Array
    shown: Array

    @classmethod
    def load(cls) -> Digits:
        """Return scikit-learn's digits, by E. Alpaydin and C. Kaynak (UCI repository, CC BY 4.0)."""
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
        unseen = images[TRAINING_COUNT:]
        _, first_of_each = np.unique(labels[TRAINING_COUNT:], return_index=True)
        return cls(images[:TRAINING_COUNT], unseen, unseen[first_of_each])


class Deconvolution:
    """A deconvolution layer that runs on the server.

    Args:
        F: Connection to the server.
        rng: Generator for W's initial values. Their variance is such that ReLU layers keep the variance of the
            activations (K. He et al., "Delving deep into rectifiers", ICCV 2015).
        shape: The shape of W: ``(c_I, c_O, h_K, w_K)``.
        stride: Steps of the filter over the output, in pixels.
        pad: Pixels cut from the output at both ends of each axis.
    """

    def __init__(
        self,
        F: Connection,
        rng: np.random.Generator,
        shape: tuple[int, int, int, int],
        *,
        stride: int = 1,
        pad: int = 0,
    ) -> None:
        c_I, c_O, h_K, w_K = shape
        fan_in = c_I * h_K * w_K / stride**2
        self.W = rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
        self.b = np.zeros(c_O, np.float32)
        self._F = F
        self._stride = stride
        self._pad = pad

    def forward(self, x: Array) -> Array:
        """Return the layer's output."""
        return self._F.deconvolution_2d(x, self.W, self.b, self._stride, self._pad)

    def gradients(self, x: Array, gy: Array) -> tuple[Array, Array, Array]:
        """Return the gradients with respect to x, W and b, from gy, the gradient with respect to the output."""
        gx, gW, gb = self._F.deconvolution_2d_grad(x, self.W, self.b, gy, self._stride, self._pad)
        assert gx is not None  # by default all three are computed
        assert gW is not None
        assert gb is not None
        return gx, gW, gb


class _Activations(NamedTuple):
    code: Array
    hidden: Array
    y: Array


class Autoencoder:
    """Compresses an image of 64 pixels into a code of 16 numbers, and reconstructs the image from the code.

    image (64) --matrix--> code (16, 1, 1) --deconvolution, ReLU--> hidden (32, 4, 4)
    --deconvolution of stride 2, sigmoid--> image (1, 8, 8)

    The client multiplies by the matrix; the server computes the deconvolutions.
    """

    def __init__(self, F: Connection) -> None:
        rng = np.random.default_rng(SEED)
        self._matrix = rng.normal(0, 1 / 8, (64, CODE_SIZE)).astype(np.float32)
        self._first = Deconvolution(F, rng, (CODE_SIZE, HIDDEN_CHANNELS, 4, 4))
        self._second = Deconvolution(F, rng, (HIDDEN_CHANNELS, 1, 4, 4), stride=2, pad=1)

    @property
    def parameters(self) -> list[Array]:
        """The arrays that training changes."""
        first, second = self._first, self._second
        return [self._matrix, first.W, first.b, second.W, second.b]

    def reconstruct(self, images: Array) -> Array:
        """Return the images that the decoder draws from the codes of `images`."""
        return self._forward(images).y

    def loss_and_gradients(self, images: Array) -> tuple[float, list[Array]]:
        """Return the mean squared error, and its gradients with respect to `parameters`."""
        code, hidden, y = self._forward(images)
        error = y - images
        gy = 2 / error.size * error * y * (1 - y)
        g_hidden, gW_second, gb_second = self._second.gradients(hidden, gy)
        g_code, gW_first, gb_first = self._first.gradients(code, g_hidden * (hidden > 0))
        g_matrix = _flat(images).T @ _flat(g_code)
        return mean_square(error), [g_matrix, gW_first, gb_first, gW_second, gb_second]

    def _forward(self, images: Array) -> _Activations:
        code = (_flat(images) @ self._matrix)[:, :, np.newaxis, np.newaxis]
        hidden = np.maximum(self._first.forward(code), 0)
        y = _sigmoid(self._second.forward(hidden))
        return _Activations(code, hidden, y)


def _flat(images: Array) -> Array:
    return images.reshape(len(images), -1)


def _sigmoid(a: Array) -> Array:
    return (1 + np.tanh(a / 2)) / 2  # does not overflow


def mean_square(error: Array) -> float:
    """Return the mean of the squares of all elements."""
    return float(np.mean(error**2))


class Adam:
    """The optimizer: it changes parameters in place, against their gradients.

    As in D. Kingma and J. Ba, "Adam: a method for stochastic optimization" (ICLR 2015), algorithm 1,
    with the constants given there, except for the learning rate.
    """

    def __init__(self, parameters: Sequence[Array]) -> None:
        self._parameters = parameters
        self._means = [np.zeros_like(p) for p in parameters]
        self._squares = [np.zeros_like(p) for p in parameters]
        self._steps_count = 0

    def step(self, gradients: Sequence[Array]) -> None:
        """Take one step."""
        self._steps_count += 1
        mean_scale = 1 / (1 - 0.9**self._steps_count)
        square_scale = 1 / (1 - 0.999**self._steps_count)
        for parameter, mean, square, gradient in zip(
            self._parameters, self._means, self._squares, gradients, strict=True
        ):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            deviation = np.sqrt(square_scale * square) + 1e-8
            parameter -= LEARNING_RATE * mean_scale * mean / deviation


def train(autoencoder: Autoencoder, images: Array, steps_count: int) -> list[float]:
    """Train on random batches of `images`, and return the loss of each step.

    The mean loss is printed every `REPORT_STEPS` steps.
    """
    rng = np.random.default_rng(SEED)
    adam = Adam(autoencoder.parameters)
    losses: list[float] = []
    for step in range(1, steps_count + 1):
        loss, gradients = autoencoder.loss_and_gradients(rng.choice(images, BATCH_SIZE))
        adam.step(gradients)
        losses.append(loss)
        if step == 1 or step % REPORT_STEPS == 0:
            click.echo(f"  step {step:4}: loss {np.mean(losses[-REPORT_STEPS:]):.4f}")
    return losses


def run(F: Connection, folder: Path, steps_count: int) -> Image.Image:
    """Train on digits, print the loss, and save a picture of digits that were not in the training set.

    Returns:
        The picture, with originals above and their reconstructions below.
    """
    digits = Digits.load()
    click.echo(f"\nTraining a decoder on {len(digits.training)} digits, {BATCH_SIZE} a step")
    start_s = time.perf_counter()
    autoencoder = Autoencoder(F)
    with F.using_config("cudnn_deterministic", True):  # so that each run prints the same losses
        train(autoencoder, digits.training, steps_count)
    click.echo(f"  trained in {time.perf_counter() - start_s:.1f} s")
    loss = mean_square(autoencoder.reconstruct(digits.unseen) - digits.unseen)
    click.echo(
        f"  loss for {len(digits.unseen)} digits that were not in the training set: {loss:.4f}"
    )
    picture = digits_picture(digits.shown, autoencoder.reconstruct(digits.shown))
    save(picture, folder / "digits.png")
    return picture


def digits_picture(originals: Array, reconstructions: Array) -> Image.Image:
    """Return a picture of images with values from 0 to 1, and of their reconstructions below them."""
    return column([_digits_row(originals), _digits_row(reconstructions)])


def _digits_row(images: Array) -> Image.Image:
    return row([magnify(from_grey_levels(255 * image[0]), 7) for image in images])


steps_option = click.option(
    "--steps",
    "steps_count",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Training steps.",
)


@click.command()
@target_option
@output_option
@steps_option
def main(target: str, folder: Path, steps_count: int) -> None:
    """Train an autoencoder of digits with two deconvolution layers on the server."""
    with report_errors(), open_connection(target) as F:
        run(F, folder, steps_count)


if __name__ == "__main__":
    main()
