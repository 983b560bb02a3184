"""Which devices a name stands for, found out in a process of its own: a supervisor loads no CUDA.

That process takes a second or more, so what the system's files tell is asked first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.device.opening import check_device_name, device_ids
from deconvd_server.exit_reasons import ExitReasons, StoppedError

__all__ = ["devices_of", "may_be_several"]

_TIMEOUT_S: Final = 120.0
"""Longer than the first use of a GPU takes."""

_END_S: Final = 1.0
"""How long a process may take to end that has answered, or was killed. A driver may keep it from that for ever."""

_ANSWER_BYTES: Final = 1 << 16

_ROOT: Final = Path("/")

_CARD_NODE: Final = re.compile(r"nvidia\d+")

_NVIDIA: Final = "0x10de"
"""NVIDIA's number as the vendor of a PCI device."""

_DISPLAY: Final = "0x03"
"""What the class of a PCI device begins with that can be a GPU. Those for sound or USB on a card have other classes."""

_log = logging.getLogger(__name__)

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


def devices_of(name: str, reasons: ExitReasons | None = None) -> list[str]:
    """Return the ids of the devices that ``--device`` names, as `open_devices` would open them.

    Args:
        reasons: Has the signals, which are heeded meanwhile; None if the caller does that.

    Raises:
        StoppedError: There is a reason to end.
        InvalidArgumentError: The name is malformed, or names a card that the host does not have.
        DeviceUnavailableError: The driver sees no card, and the name wants one; or nobody can tell.
    """
    check_device_name(name)
    if name == "cpu":
        return [name]
    command = [sys.executable, "-P", "-m", __name__, name]
    try:
        ids, kind, text = json.loads(_output_of(command, reasons))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise DeviceUnavailableError(f"the cards cannot be counted: {error}") from None
    if kind:
        raise _ERRORS[kind](text)
    return list(ids)


def _output_of(command: Sequence[str], reasons: ExitReasons | None) -> bytes:
    """Run a command of our own, and return what it has written to its standard output, unless a reason to end comes."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    process = subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for this process, which kills it
    )
    assert process.stdout is not None
    output = b""
    try:
        with process.stdout as pipe, selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            if reasons is not None:
                selector.register(reasons, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(deadline_s - time.monotonic())]
                if reasons in ready and (reason := reasons.take(0)) is not None:
                    raise StoppedError(reason)
                if not ready:
                    raise subprocess.TimeoutExpired(command, _TIMEOUT_S)
                if pipe in ready:
                    part = os.read(pipe.fileno(), _ANSWER_BYTES)
                    if not part:
                        break
                    output += part
        try:
            code = process.wait(_END_S)
        except subprocess.TimeoutExpired:  # a driver holds it, but its answer is whole
            code = 0
    finally:
        _kill(process)
    if code:
        raise subprocess.CalledProcessError(code, command)
    return output


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        _log.error(
            "process %d, which counts the cards, does not end when it is killed", process.pid
        )


def _main() -> None:
    try:
        answer = device_ids(sys.argv[1]), "", ""
    except (InvalidArgumentError, DeviceUnavailableError) as error:
        answer = [], type(error).__name__, str(error)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
