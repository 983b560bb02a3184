"""Kernels on a card: those of usual layers are not compiled, the others once, and none waits for another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd_server.device.cuda.api.runtime import current_device
from deconvd_server.device.cuda.device import CudaDevice
from deconvd_server.device.cuda.kernels.cubins import Cubins
from deconvd_server.device.cuda.kernels.elementwise import crop_kernel
from deconvd_server.device.cuda.kernels.launch import Kernel, _LoadedKernels

pytestmark = pytest.mark.gpu

CALLS = """
import sys
from itertools import product
import numpy as np
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnn
from deconvd.model.problem import Problem, spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda import open_device
from tests.devices import GradientRequest, deconvolve, gradients

card = open_device(0)
card.wait_until_warm()
assert card.plans.stats.chosen_count == 0
for dtype in ("float32", "float16"):
    x = np.ones((2, 64, 20, 24), dtype)
    W = np.ones((64, 32, *map(int, sys.argv[1:3])), dtype)
    problem = Problem(spec_of(x), spec_of(W), Geometry(tuple(map(int, sys.argv[3:5])), (1, 1)))
    for use_cudnn, is_steady in product(UseCudnn, (False, True)):
        options = Options(use_cudnn=use_cudnn, cudnn_deterministic=is_steady)
        y = deconvolve(card, problem, x, W, None, options, CallContext())
        gradients(card, problem, x, W, y, GradientRequest(), options, CallContext())
card.close()
"""


def make_calls(home: Path, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    """Make calls of a layer in a new process."""
    numbers: Sequence[str] = [*map(str, (*kernel, *stride))]
    paths = [str(Path(__file__).parent.parent), *sys.path]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": ":".join(paths)}
    environment.pop("XDG_CACHE_HOME", None)
    subprocess.run(
        [sys.executable, "-c", CALLS, *numbers], env=environment, check=True, timeout=120
    )


def test_a_usual_layer_compiles_nothing(tmp_path: Path) -> None:
    make_calls(tmp_path, (4, 4), (2, 2))
    assert not (tmp_path / ".cache" / "deconvd").exists()


def test_an_unusual_layer_compiles_once(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "deconvd" / "kernels"
    make_calls(tmp_path, (6, 5), (3, 5))
    kept = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert kept
    make_calls(tmp_path, (6, 5), (3, 5))
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == kept


class HeldCubins(Cubins):
    """Machine code that is found only once it is let go, if it is of a certain kernel."""

    def __init__(self, held: Kernel) -> None:
        super().__init__()
        self.held = held
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def find(self, text: str, options: Sequence[str], capability: int) -> bytes:
        """See `Cubins`."""
        if options == self.held.options:
            self.is_asked.set()
            assert self.may_go_on.wait(60)
        return super().find(text, options, capability)


def test_who_needs_another_kernel_goes_on_while_one_is_compiled() -> None:
    slow, quick = (crop_kernel(dtype) for dtype in ELEMENT_TYPES[:2])
    cubins = HeldCubins(slow)
    loaded = _LoadedKernels(cubins)
    pointers = dict[str, int]()

    def load_slow() -> None:
        with current_device(0):
            pointers["slow"] = loaded.get(slow)

    with current_device(0):
        assert loaded.get(quick)
        thread = threading.Thread(target=load_slow)
        thread.start()
        assert cubins.is_asked.wait(60)
        other = crop_kernel(ELEMENT_TYPES[2])
        assert loaded.get(other)
        assert not pointers
        cubins.may_go_on.set()
        thread.join()
        assert loaded.get(slow) == pointers["slow"]


def test_a_rehearsal_leaves_nothing_but_what_is_loaded(tmp_path: Path) -> None:
    card = CudaDevice(0, plan_store=tmp_path)
    try:
        card.rehearse()
        card._rehearsal.wait(60)
        assert card.memory.stats.used_bytes == 0
        assert card.memory.stats.leased_count >= 9  # three types, three products
        assert card.plans.stats.chosen_count == 0
        assert card.plans.stats.cache.count == 0
        assert not [*tmp_path.rglob("*.json")]
        assert {*card._lanes.streams} <= {*card._cudnn._handles}
    finally:
        card.close()
