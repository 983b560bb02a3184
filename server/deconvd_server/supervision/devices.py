"""Which devices a name stands for, found out in a process of its own: a supervisor loads no CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.device.opening import check_device_name, device_ids

__all__ = ["devices_of"]

_TIMEOUT_S: Final = 120.0
"""Longer than the first use of a GPU takes."""

_ERRORS: Final = {error.__name__: error for error in (InvalidArgumentError, DeviceUnavailableError)}


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
