"""The demo: both its programs, over a real server process."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from deconvd_client import Connection, InvalidArgumentError, connect
from examples import demo, enlarge_photograph, train_decoder
from examples.enlarge_photograph import difference, enlarge, enlarge_with_pillow
from examples.local_server import local_server
from examples.pictures import Array
from examples.train_decoder import Autoencoder, Digits, train

PICTURES = ["demo.png", "digits.png", "photograph-2x.png", "photograph-4x.png", "photograph.png"]


@pytest.fixture(scope="module")
def F() -> Iterator[Connection]:
    with local_server("cpu") as target, connect(target) as F:
        yield F


@pytest.fixture(scope="module")
def photograph() -> Array:
    return enlarge_photograph.load_photograph()[20:60, 180:250]


@pytest.mark.parametrize("factor", enlarge_photograph.FACTORS)
def test_enlargement_is_that_of_pillow_up_to_its_rounding(
    F: Connection, photograph: Array, factor: int
) -> None:
    enlarged = enlarge(F, photograph, factor)

    # The weights are multiples of 1/64, so float32 holds all products and sums exactly.
    exact = difference(enlarged, enlarge_with_pillow(photograph.astype(np.float32), factor))
    assert exact.largest == 0
    # Pillow rounds after each axis: the first rounding moves a value by half a grey level at most,
    # so the second can end one level beside ours, and not two.
    rounded = difference(np.rint(enlarged), enlarge_with_pillow(photograph, factor))
    assert rounded.largest <= 1


def test_an_odd_factor_is_centred_too(F: Connection, photograph: Array) -> None:
    exact = difference(
        enlarge(F, photograph, 3), enlarge_with_pillow(photograph.astype(np.float32), 3)
    )

    assert exact.largest < 255 * 1e-6  # thirds are not exact: a few roundings, of 6e-8 each


def test_remote_gradients_are_those_of_the_loss(F: Connection) -> None:
    images = Digits.load().training[:4]
    autoencoder = Autoencoder(F)
    _, gradients = autoencoder.loss_and_gradients(images)

    for parameter, gradient in zip(autoencoder.parameters, gradients, strict=True):
        slope = _slope(autoencoder, images, parameter, np.sign(gradient))
        # float32 rounds the loss by 1e-8 or so, and the step of 1e-3 is not quite infinitesimal.
        assert slope == pytest.approx(np.abs(gradient).sum(), rel=2e-2)


def _slope(autoencoder: Autoencoder, images: Array, parameter: Array, direction: Array) -> float:
    """Return the loss's derivative along a direction of one parameter, by central difference."""
    step = np.float32(1e-3)
    losses = []
    for sign in (1, -1):
        parameter += sign * step * direction
        losses.append(autoencoder.loss_and_gradients(images)[0])
        parameter -= sign * step * direction
    return (losses[0] - losses[1]) / (2 * float(step))


def test_training_reduces_the_loss(F: Connection) -> None:
    images = Digits.load().training

    losses = train(Autoencoder(F), images, steps_count=40)

    assert np.mean(losses[-5:]) < losses[0] / 2  # it was a quarter when this was written


def test_demo_saves_pictures_and_says_where(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        demo.main, ["--device", "cpu", "--steps", "2", "--output", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    assert str(tmp_path) in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    for path in tmp_path.iterdir():
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("program", [enlarge_photograph, train_decoder])
def test_wrong_target_is_told_in_one_line(program: ModuleType, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/nobody.sock"

    result = CliRunner().invoke(program.main, ["--target", target, "--output", str(tmp_path)])

    assert result.exit_code == 1
    assert result.output.startswith("Error: no server was reached: is deconvd-server running at")
    assert result.output.count("\n") == 1


def test_server_that_does_not_start_is_told() -> None:
    with pytest.raises(InvalidArgumentError, match=r"did not start: .*'abacus'"):
        with local_server("abacus"):
            pass
