"""Opens the devices that the user names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deconvd.errors import InvalidArgumentError
from deconvd_server.device import cuda
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.faults import DeviceLostError, DeviceUnavailableError
from deconvd_server.device.protocol import Device

__all__ = ["DeviceSettings", "check_device_name", "device_ids", "open_devices", "start_devices"]

_CARDS = re.compile(r"cuda(:\d{1,4}(,cuda:\d{1,4})*)?")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Settings for all devices that are opened.

    Attributes:
        threads_count: Threads that compute on the processor; None for one for each processor.
        memory_limit_bytes: Bound on the memory that calls and residents take of each device; None for the device's
            default.
        plan_store: Folder where plans for cards are stored; None to forget them with the process.
        on_lost: Called, from any thread, when a card must be reset, which only a new process recovers from.
        card_parts_count: How many processes share each card's memory: the default limit is a part of it.
        is_plan_store_lasting: Whether the folder of plans outlives the server.
    """

    threads_count: int | None
    memory_limit_bytes: int | None
    plan_store: Path | None
    on_lost: Callable[[DeviceLostError], None]
    card_parts_count: int = 1
    is_plan_store_lasting: bool = True


def check_device_name(name: str) -> None:
    """Raise InvalidArgumentError unless `open_devices` takes the name."""
    if name not in ("cpu", "auto") and not _CARDS.fullmatch(name):
        raise InvalidArgumentError(
            f"--device must be cpu, cuda, cuda:N, several as in cuda:0,cuda:1, or auto, got {name!r}",
            argument="device",
        )


def start_devices(name: str) -> None:
    """Have the devices of a name started in the background, so that `open_devices` waits less. It reports all errors.

    Raises InvalidArgumentError if the name is malformed.
    """
    check_device_name(name)
    if name != "cpu":
        cuda.start_cards(None if name in ("cuda", "auto") else _numbers(name))


def open_devices(name: str, settings: DeviceSettings) -> Sequence[Device]:
    """Open the devices of a name. Return at least one. Cards warm up in the background.

    Args:
        name: ``cpu``; ``cuda`` for all cards; ``cuda:N``, or several of them with commas between; ``auto`` for all
            cards, or for the processor if no card can be used, which is logged.

    Raises:
        InvalidArgumentError: The name is malformed, or names a card that the host does not have.
        DeviceUnavailableError: A named card cannot be used.
    """
    check_device_name(name)
    if name == "cpu":
        return [_open_processor(settings)]
    if name != "auto":
        return _open_cards(_ordinals(name), settings)
    try:
        ordinals = _ordinals("cuda")
    except DeviceUnavailableError as error:
        _log.info("computing on the processor, since there is no GPU: %s", error)
        return [_open_processor(settings)]
    try:
        return _open_cards(ordinals, settings)
    except DeviceUnavailableError as error:
        _log.warning("computing on the processor, since no GPU can be used: %s", error)
        return [_open_processor(settings)]


def device_ids(name: str) -> list[str]:
    """Return the ids of the devices that `open_devices` would open. No card is opened, but CUDA is loaded.

    If a card is too old, that is so for all of them, as where one process opens them.

    Raises:
        InvalidArgumentError, DeviceUnavailableError: As `open_devices`.
    """
    check_device_name(name)
    if name == "cpu":
        return [name]
    try:
        ordinals = _ordinals("cuda" if name == "auto" else name)
        for ordinal in ordinals:
            cuda.check_device(ordinal)
    except DeviceUnavailableError as error:
        if name != "auto":
            raise
        _log.info("computing on the processor, since no GPU can be used: %s", error)
        return ["cpu"]
    return [f"cuda:{ordinal}" for ordinal in ordinals]


def _open_processor(settings: DeviceSettings) -> Device:
    return CpuDevice(settings.threads_count, memory_limit_bytes=settings.memory_limit_bytes)


def _open_cards(ordinals: Sequence[int], settings: DeviceSettings) -> list[Device]:
    return [
        cuda.open_device(
            ordinal,
            memory_limit_bytes=settings.memory_limit_bytes,
            plan_store=settings.plan_store,
            on_lost=settings.on_lost,
            parts_count=settings.card_parts_count,
            is_plan_store_lasting=settings.is_plan_store_lasting,
        )
        for ordinal in ordinals
    ]


def _ordinals(name: str) -> list[int]:
    count = cuda.devices_count()
    if count == 0:
        raise DeviceUnavailableError("no GPU: the driver sees none")
    if name == "cuda":
        return list(range(count))
    ordinals = _numbers(name)
    for ordinal in ordinals:
        if ordinal >= count or ordinals.count(ordinal) > 1:
            raise InvalidArgumentError(
                f"--device must name cards from cuda:0 to cuda:{count - 1}, each once, got {name}",
                argument="device",
            )
    return ordinals


def _numbers(name: str) -> list[int]:
    """Return the numbers of the cards that a name has."""
    return [int(card.removeprefix("cuda:")) for card in name.split(",")]
