"""Chooses which workers a server has: by `--processes`, or else one for each GPU where there are several.

Whoever had one process before there was this default, and does not ask for several, must lose nothing by it: neither a
port that clients can reach, nor an option that was right, nor calls as large as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deconvd.errors import InvalidArgumentError
from deconvd.host.machine import memory_bytes
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.exit_reasons import ExitReasons
from deconvd_server.resources.budgets import Budgets
from deconvd_server.supervision.devices import devices_of, may_be_several
from deconvd_server.supervision.layout import (
    WorkerPlace,
    check_layout,
    tcp_addresses,
    worker_places,
)

__all__ = ["ProcessChoice", "choose_processes"]


@dataclass(frozen=True, slots=True)
class ProcessChoice:
    """Which processes serve.

    Attributes:
        places: The places of the workers; empty if one process serves alone.
        reason: Why one process serves alone even if there are several GPUs; empty if an option says so.
    """

    places: Sequence[WorkerPlace] = ()
    reason: str = ""


def choose_processes(
    options: Mapping[str, Any], reasons: ExitReasons | None = None
) -> ProcessChoice:
    """Return which processes serve.

    Args:
        options: The values of all options of the command, by the names of the parameters. ``processes`` is None where
            none was given.
        reasons: Has the signals, which are heeded meanwhile; None if the caller does that.

    Raises:
        StoppedError: As `devices_of`.
        InvalidArgumentError: An option is not possible with so many processes, or names a card that is not there.
        DeviceUnavailableError: As `devices_of`.
    """
    count = options["processes"]
    if count is None:
        return _choose_by_cards(options, reasons)
    if count == 0:
        return ProcessChoice()
    places = worker_places(count, devices_of(options["device"], reasons))
    if len(places) == 1:
        return ProcessChoice()
    check_layout(options, len(places))
    return ProcessChoice(places)


def _choose_by_cards(options: Mapping[str, Any], reasons: ExitReasons | None) -> ProcessChoice:
    if not may_be_several(options["device"]):
        return ProcessChoice()
    if reason := _reason_before_counting(options):
        return ProcessChoice(reason=reason)
    try:
        devices = devices_of(options["device"], reasons)
    except DeviceUnavailableError as error:
        # one process says so as well, or finds cards that nobody could count
        return ProcessChoice(reason=str(error))
    if len(devices) == 1:
        return ProcessChoice()
    try:
        places = worker_places(1, devices)
        check_layout(options, len(places))
    except InvalidArgumentError as error:
        return ProcessChoice(reason=str(error))
    if reason := _reason_by_memory(options, len(places), memory_bytes()):
        return ProcessChoice(reason=reason)
    return ProcessChoice(places)


def _reason_before_counting(options: Mapping[str, Any]) -> str:
    """Return why one process should serve, however many cards there are; empty if it should not."""
    if options["parent"] is not None:
        return "it serves the process that has started it"
    has_one_port = options["direct_port"] and not options["worker_port"]
    if has_one_port and options["takes_direct_calls"] and tcp_addresses(options["addresses"]):
        return (
            "--direct-port names one port, which may be the only one that clients can reach, and each process "
            "needs two: set --worker-port as well, or --processes"
        )
    return ""


def _reason_by_memory(options: Mapping[str, Any], count: int, whole_bytes: int) -> str:
    """Return why several processes would have too little memory each; empty if they would not."""
    part_bytes = whole_bytes // count
    least_bytes = Budgets.of(whole_bytes).largest_message_bytes
    if options["max_message_bytes"] is None and (
        Budgets.of(part_bytes).largest_message_bytes < least_bytes
    ):
        return (
            f"each of {count} processes would have {part_bytes} bytes of memory, and take smaller messages than "
            "one does: set --processes to have them all the same"
        )
    return ""
