"""What a server says, in one line, where a card cannot be used."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_HAS_CUPY = importlib.util.find_spec("cupy") is not None

_HIDDEN_CUDNN = "import sys, cupy; sys.modules['cuda.pathfinder'] = None"  # which CuPy needs too
_OLD_CUDNN = (
    "import deconvd_server.device.cuda.cudnn.library as cudnn; cudnn._OLDEST_VERSION = 10**6"
)
_OLD_CARD = "import deconvd_server.device.cuda.runtime as runtime; runtime._OLDEST_CAPABILITY = 999"


def _last_words(before: str = "", **environment: str) -> str:
    """Return what a server for a card says before it gives up, and check that it is one line."""
    command = f"{before}\nfrom deconvd_server.__main__ import main\nmain()"
    outcome = subprocess.run(
        [sys.executable, "-c", command, "--device", "cuda", "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )
    lines = outcome.stderr.splitlines()
    assert outcome.returncode == 1
    assert len(lines) == 1, outcome.stderr
    return lines[0]


@pytest.mark.skipif(_HAS_CUPY, reason="CuPy is installed")
def test_without_cupy_it_says_what_to_install() -> None:
    assert "CuPy cannot be loaded" in (said := _last_words())
    assert "pip install '.[server,cuda13]'" in said


@pytest.mark.gpu
def test_without_a_card_to_see_it_says_that_a_driver_is_needed() -> None:
    assert "driver" in _last_words(CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("before", "fault"),
    [(_HIDDEN_CUDNN, "cuDNN 9 cannot be loaded"), (_OLD_CUDNN, "is too old, 1000000 or newer")],
)
def test_without_a_cudnn_that_will_do_it_says_what_to_install(before: str, fault: str) -> None:
    assert fault in (said := _last_words(before))
    assert "pip install '.[server,cuda13]'" in said


@pytest.mark.gpu
def test_a_card_that_is_too_old_is_named_with_what_is_needed() -> None:
    assert "cuda:0, NVIDIA" in (said := _last_words(_OLD_CARD))
    assert "Ampere" in said


@pytest.mark.gpu
def test_a_card_that_the_host_does_not_have_is_a_wrong_option() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "deconvd_server", "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"DECONVD_DEVICE": "cuda:99"},
    )

    assert outcome.returncode == 2
    assert (
        "Invalid value for DECONVD_DEVICE: --device must name cards from cuda:0" in outcome.stderr
    )
