"""Which devices a name stands for, found out in a process of its own: a supervisor loads no CUDA.

That process takes a second or more, so what the system's files tell is asked first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.device.opening import check_device_name, device_ids

__all__ = ["devices_of", "may_be_several"]

_TIMEOUT_S: Final = 120.0
"""Longer than the first use of a GPU takes."""

_ROOT: Final = Path("/")

_CARD_NODE: Final = re.compile(r"nvidia\d+")

_NVIDIA: Final = "0x10de"
"""NVIDIA's number as the vendor of a PCI device."""

_DISPLAY: Final = "0x03"
"""What the class of a PCI device begins with that can be a GPU. Those for sound or USB on a card have other classes."""

_ERRORS: Final = {error.__name__: error for error in (InvalidArgumentError, DeviceUnavailableError)}


def may_be_several(
    name: str, environment: Mapping[str, str] = os.environ, root: Path = _ROOT
) -> bool:
    """Return whether ``--device`` may name more than one device, by what is cheap to find out.

    If this is false, `devices_of` returns one name at most. It is never true for the processor, or for one named card.

    Args:
        environment: The variables of the process that opens the cards.
        root: Folder that ``/dev`` and ``/sys`` are in, for tests.

    The driver shows no more cards than there are entries in ``CUDA_VISIBLE_DEVICES``: a number, the UUID of a card, or
    that of a part of one (MIG). A container has the ``/dev/nvidia0`` of its own cards alone, and of those that are
    divided a process sees one part. Before anyone has used a card since the host's start, these files may be missing.
    Then the host's PCI devices count. Windows has its own way to the cards (``/dev/dxg``).
    """
    if name not in ("auto", "cuda"):
        return "," in name
    if "," not in environment.get("CUDA_VISIBLE_DEVICES", ","):
        return False
    nodes_count = sum(bool(_CARD_NODE.fullmatch(node)) for node in _names_in(root / "dev"))
    if nodes_count:
        return nodes_count > 1
    return (root / "dev/dxg").exists() or _display_devices_count(root / "sys/bus/pci/devices") > 1


def _display_devices_count(folder: Path) -> int:
    """Return how many devices in a folder of PCI devices are of NVIDIA, and may be GPUs."""
    devices = [folder / device for device in _names_in(folder)]
    return sum(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in devices
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def devices_of(name: str) -> list[str]:
    """Return the ids of the devices that ``--device`` names, as `open_devices` would open them.

    Raises:
        InvalidArgumentError: The name is malformed, or names a card that the host does not have.
        DeviceUnavailableError: The driver sees no card, and the name wants one; or nobody can tell.
    """
    check_device_name(name)
    if name == "cpu":
        return [name]
    command = [sys.executable, "-P", "-m", __name__, name]
    try:
        asked = subprocess.run(  # noqa: S603 - our own command
            command,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
        )
        ids, kind, text = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise DeviceUnavailableError(f"the cards cannot be counted: {error}") from None
    if kind:
        raise _ERRORS[kind](text)
    return list(ids)


def _main() -> None:
    try:
        answer = device_ids(sys.argv[1]), "", ""
    except (InvalidArgumentError, DeviceUnavailableError) as error:
        answer = [], type(error).__name__, str(error)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
