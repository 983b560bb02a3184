"""Which workers a server has: their devices, addresses, and parts of what the options give all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deconvd.errors import InvalidArgumentError
from deconvd.host.system import MAX_UNIX_PATH_BYTES, is_valid_unix_path
from deconvd_server.resources.worker_table import MAX_WORKERS_COUNT
from deconvd_server.transports.listen import host_of, side_hosts, unix_path_to_bind

__all__ = [
    "WorkerPlace",
    "check_layout",
    "check_ports",
    "describe_places",
    "own_addresses",
    "own_options",
    "tcp_addresses",
    "worker_places",
]

_LAST_PORT: Final = 65535

_SHARED_OF_HOST: Final = ("shared_memory_bytes", "spill_memory_bytes", "threads")
"""Options about the host that are for all workers together."""

_SHARED_OF_DEVICE: Final = ("device_memory_bytes", "resident_memory_bytes")
"""Options about each device that are for all of its workers together."""


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """A worker's place among the others, which is the same after each restart.

    Attributes:
        name: Its name, which is its number.
        device: Its device, as in ``--device``.
        sharers_count: How many workers have that device.
    """

    name: str
    device: str
    sharers_count: int


def worker_places(processes_count: int, devices: Sequence[str]) -> list[WorkerPlace]:
    """Return the places of all workers, those of one device after those of another.

    Args:
        processes_count: How many workers each device gets.
        devices: The devices.

    Raises:
        InvalidArgumentError: There would be too many.
    """
    if processes_count * len(devices) > MAX_WORKERS_COUNT:
        raise InvalidArgumentError(
            f"--processes must make at most {MAX_WORKERS_COUNT} processes, got {processes_count} for each of "
            f"{len(devices)} devices",
            argument="processes",
        )
    names = (device for device in devices for _ in range(processes_count))
    return [
        WorkerPlace(str(number), device, processes_count) for number, device in enumerate(names)
    ]


def describe_places(places: Sequence[WorkerPlace]) -> str:
    """Return in words which workers there will be, for the log."""
    devices = list(dict.fromkeys(place.device for place in places))
    each = f" for each of {', '.join(devices)}" if len(devices) > 1 else f" on {devices[0]}"
    count = len(places) // len(devices)
    return f"{count} {'process' if count == 1 else 'processes'}{each} (--processes)"


def tcp_addresses(addresses: Sequence[str]) -> list[str]:
    """Return those addresses to listen on that are no Unix sockets."""
    return [address for address in addresses if host_of(address) is not None]


def check_layout(options: Mapping[str, Any], count: int) -> None:
    """Raise InvalidArgumentError unless each of several workers can have the ports and paths that the options say.

    Args:
        options: The values of all options of the command, by the names of the parameters.
        count: How many workers there are.
    """
    for name in range(count):
        own_addresses(options["addresses"], str(name), 0)
    tcp = tcp_addresses(options["addresses"])
    users: dict[int, str] = {}
    for address in tcp:
        users[int(address.rpartition(":")[2])] = "--listen"
    users |= {options[option] or 0: _word(option) for option in ("health_port", "metrics_port")}
    ranges = ["worker_port"] if tcp else []
    if tcp and options["takes_direct_calls"]:
        ranges.append("direct_port")
    for option in ranges:
        first = options[option]
        check_ports(option, first, count)
        ports = range(first, first + count) if first else range(0)
        for port in ports:
            if port in users:
                raise InvalidArgumentError(
                    f"{_word(option)} must leave a port for each of {count} processes, and {users[port]} has "
                    f"{port}, got {first}",
                    argument=option,
                )
        users |= dict.fromkeys(ports, _word(option))


def _word(option: str) -> str:
    """Return an option as it is given."""
    return f"--{option.replace('_', '-')}"


def check_ports(option: str, first: int, count: int) -> None:
    """Raise InvalidArgumentError if ports that follow each other would not all be ports."""
    if first and first + count - 1 > _LAST_PORT:
        raise InvalidArgumentError(
            f"{_word(option)} must leave a port for each of {count} processes, up to {_LAST_PORT}, "
            f"got {first}",
            argument=option,
        )


def own_addresses(addresses: Sequence[str], name: str, grpc_port: int) -> list[str]:
    """Return the addresses at which one worker alone answers.

    Args:
        addresses: Those that all share.
        name: The worker's name.
        grpc_port: Its own port.

    Raises:
        InvalidArgumentError: A Unix path is too long for a worker's own one, or is no path to bind.
    """
    tcp = tcp_addresses(addresses)
    own = [f"{host}:{grpc_port}" for host in side_hosts(tcp)] if tcp else []
    for address in addresses:
        if host_of(address) is None:
            path = unix_path_to_bind(address)
            own_path = path.with_name(f"{path.name}.{name}")
            if not is_valid_unix_path(own_path):
                raise InvalidArgumentError(
                    f"--listen must name a Unix socket to which .{name} can be added, within {MAX_UNIX_PATH_BYTES} "
                    f"bytes in all, for a process's own socket, got {address!r}",
                    argument="listen",
                )
            own.append(f"unix:{own_path}")
    return own


def own_options(given: Mapping[str, Any], place: WorkerPlace, workers_count: int) -> dict[str, Any]:
    """Return a worker's part of the options that are for several workers together, and what the supervisor does itself.

    Args:
        given: All options, by the names of the parameters.
    """
    parts = dict.fromkeys(_SHARED_OF_HOST, workers_count)
    parts |= dict.fromkeys(_SHARED_OF_DEVICE, place.sharers_count)
    options: dict[str, Any] = {
        name: max(given[name] // count, 1) for name, count in parts.items() if given[name]
    }
    of_supervisor = {
        "health_port": None,
        "metrics_port": None,
        "metrics_readers": (),
        "parent": None,
    }
    return {**options, **of_supervisor, "device": place.device}
