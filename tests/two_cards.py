"""Two devices that stand for cards, on the processor, in all processes of a server: the one that counts them, too."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["DEVICE", "two_cards"]

DEVICE = "cuda:0,cuda:1"
"""Their names in ``--device``. Whether ``cuda`` may stand for several is read from the files of the host."""

_CARDS = """
from dataclasses import replace
from deconvd_server.device import cuda
from deconvd_server.device.cpu import CpuDevice

class Card(CpuDevice):
    def __init__(self, ordinal, **settings):
        super().__init__(1, memory_limit_bytes=settings["memory_limit_bytes"])
        self._ordinal = ordinal

    @property
    def info(self):
        return replace(super().info, id=f"cuda:{self._ordinal}")

cuda.devices_count = lambda: 2
cuda.check_device = lambda ordinal: None
cuda.open_device = Card
"""


def two_cards(directory: Path) -> dict[str, str]:
    """Return the variables with which a server has the two cards. A folder in a directory has what they need."""
    folder = directory / "two-cards"
    folder.mkdir()
    # each Python imports it when it starts
    (folder / "sitecustomize.py").write_text(_CARDS)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
