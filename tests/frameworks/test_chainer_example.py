"""The decoder in Chainer learns what the same decoder by NumPy does."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.frameworks.example_programs import decoder_losses
from tests.servers import ServerProcess


def test_the_decoder_has_the_losses_of_that_by_numpy(server: ServerProcess, tmp_path: Path) -> None:
    losses = decoder_losses("decoder_chainer", server.target, str(tmp_path))

    # printed with four digits; sums of float32 in another order change the fifth
    expected = decoder_losses("train_decoder", server.target, str(tmp_path))
    assert losses == pytest.approx(expected, abs=3e-4)
    assert losses[1] < losses[0] / 2
    with Image.open(tmp_path / "digits-chainer.png", formats=["PNG"]) as picture:
        picture.load()
