"""What a server says, in one line, where a card cannot be used."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deconvd_server.device.cuda.cudnn.library import check_version
from deconvd_server.device.faults import DeviceUnavailableError

_HAS_CUPY = importlib.util.find_spec("cupy") is not None

_HIDDEN_CUDNN = "import sys, cupy; sys.modules['cuda.pathfinder'] = None"  # which CuPy needs too
_OLD_CUDNN = (
    "import deconvd_server.device.cuda.cudnn.library as cudnn; cudnn._OLDEST_VERSION = 10**6"
)
_OLD_CARD = (
    "import deconvd_server.device.cuda.api.runtime as runtime; runtime._OLDEST_CAPABILITY = 999"
)


def _last_words(before: str = "", **environment: str) -> str:
    """Return what a server for a card says before it gives up, and check that it is one line."""
    command = f"{before}\nfrom deconvd_server.__main__ import main\nmain()"
    options = ["--device", "cuda", "--processes", "0"]
    outcome = subprocess.run(
        [sys.executable, "-c", command, *options, "--listen", "127.0.0.1:0"],
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
    [(_HIDDEN_CUDNN, "cuDNN 9 cannot be loaded"), (_OLD_CUDNN, "100.0.0 or newer is needed")],
)
def test_without_a_cudnn_that_will_do_it_says_what_to_install(before: str, fault: str) -> None:
    assert fault in (said := _last_words(before))
    assert "pip install '.[server,cuda13]'" in said


@pytest.mark.gpu
def test_the_cudnn_that_will_not_do_is_named_with_where_it_is() -> None:
    assert re.search(
        r"cuDNN 9\.\d+\.\d+, loaded from /.*libcudnn.*, is too old", _last_words(_OLD_CUDNN)
    )


@pytest.mark.gpu
def test_with_a_cudnn_that_will_not_do_the_processor_computes_where_it_may(
    tmp_path: Path,
) -> None:
    # each Python imports it when it starts: also the one that counts the cards, and those of several cards
    (tmp_path / "sitecustomize.py").write_text(_OLD_CUDNN)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    options = ("--device", "auto", "--listen", "127.0.0.1:0", "--log-level", "info")
    with subprocess.Popen(
        [sys.executable, "-m", "deconvd_server", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        assert process.stdout is not None
        try:
            assert "listening" in process.stdout.readline()
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60)
    assert "computing on the processor, since no GPU can be used: cuDNN 9" in log


@pytest.mark.parametrize("version", [8907, 91000, 91400, 91899])
def test_a_cudnn_older_than_the_one_that_is_tested_is_refused_in_one_line(version: int) -> None:
    with pytest.raises(DeviceUnavailableError) as refused:
        check_version(version, "/usr/lib/libcudnn.so.9")
    said = str(refused.value)
    assert "loaded from /usr/lib/libcudnn.so.9, is too old" in said
    assert "9.19.0 or newer is needed" in said
    assert "\n" not in said


@pytest.mark.parametrize("version", [91900, 91901, 92000, 100000])
def test_a_cudnn_as_new_as_the_one_that_is_tested_will_do(version: int) -> None:
    check_version(version, "/usr/lib/libcudnn.so.9")


def test_the_extra_brings_a_cudnn_that_will_do_and_none_that_will_not() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extra = " ".join(pyproject["project"]["optional-dependencies"]["cuda13"])
    least = re.search(r"nvidia-cudnn-cu13>=9\.(\d+),<10", extra)
    assert least is not None
    minor = int(least[1])
    check_version(90000 + 100 * minor, "")
    with pytest.raises(DeviceUnavailableError):
        check_version(90000 + 100 * minor - 1, "")


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
