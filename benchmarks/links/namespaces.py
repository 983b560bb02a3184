"""A link between two network namespaces of this machine, with a rate: this process's own, and one for a server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final

__all__ = ["Link", "LinkUnavailableError", "linked_namespace"]

_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_TOOLS: Final = ("ip", "tc")
_NUMBERS: Final = count()
_SUBNETS_COUNT: Final = 1 << 15
"""How many subnets of four addresses 198.18.0.0/15 has, which RFC 2544 sets aside for benchmarks."""

_NEXT_SUBNET: Final = 7919
"""How far apart the subnets of one process are. Processes that start one after the other have adjacent ones."""

_BURST: Final = ("burst", "256kb", "latency", "20ms")
"""How much may pass at once, and how long bytes may wait in the queue. Both are as large as those of usual routers."""


class LinkUnavailableError(RuntimeError):
    """No link can be made here. The message says what is missing."""


@dataclass(frozen=True)
class Link:
    """A pair of virtual network devices.

    Attributes:
        namespace: Name of the server's network namespace.
        server_address: IPv4 address of the server's end.
        client_address: IPv4 address of this process's end.
    """

    namespace: str
    server_address: str
    client_address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that runs another one in the server's namespace, under the same process id."""
        return [_tool("ip"), "netns", "exec", self.namespace, *words]


@contextmanager
def linked_namespace(rate_gbit: float) -> Iterator[Link]:
    """Have a namespace that a link of a rate leads to, for the block.

    Each end sends at most that rate, with up to 20 ms of bytes in its queue.

    Raises:
        LinkUnavailableError: The user is not root, iproute2 is missing, or the system does not allow it.
    """
    if os.geteuid() != 0:
        raise LinkUnavailableError("only root may make network namespaces: run as root")
    for tool in _TOOLS:
        _tool(tool)
    number = (os.getpid() + next(_NUMBERS) * _NEXT_SUBNET) % _SUBNETS_COUNT
    name, near, far = f"deconvd-{number}", f"deconvd-n{number}", f"deconvd-f{number}"
    link = Link(name, _address(number, 2), _address(number, 1))
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        try:
            for prefix, device, address in (
                ((), near, link.client_address),
                (("-n", name), far, link.server_address),
            ):
                _run("ip", *prefix, "address", "add", f"{address}/30", "dev", device)
                _run("ip", *prefix, "link", "set", device, "up")
                _run("tc", *prefix, *_rate_words(device, rate_gbit))
            _run("ip", "-n", name, "link", "set", "lo", "up")
            yield link
        finally:
            _run(
                "ip", "link", "delete", near
            )  # at once; with its namespace it would go some time later
    finally:
        _run("ip", "netns", "delete", name)


def _rate_words(device: str, rate_gbit: float) -> Sequence[str]:
    """Return the arguments of tc that bound what a device sends."""
    rate = f"{rate_gbit * 1e3:g}mbit"
    return ("qdisc", "add", "dev", device, "root", "tbf", "rate", rate, *_BURST)


def _address(subnet_number: int, host_number: int) -> str:
    number = subnet_number * 4 + host_number
    return f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def _tool(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise LinkUnavailableError(f"{name} is missing: install iproute2")
    return found


def _run(tool: str, *words: str) -> None:
    done = subprocess.run([_tool(tool), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkUnavailableError(f"{tool} {' '.join(words)} failed: {done.stderr.strip()}")
