"""Which HTTP proxy gRPC uses for a target, according to the environment.

gRPC takes the first of three variables that is set, unless the host is in the list of a further variable. gRPC uses a
proxy for targets on this host, too; this client does not.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from deconvd_client.transports.targets import host_of, is_local

__all__ = ["Proxy", "proxy_for"]

_PROXY_VARIABLES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES: Final = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    Attributes:
        address: Its host and port, without the user name and password that the URL may have.
        variable: The environment variable that names it.
    """

    address: str
    variable: str


def proxy_for(target: str) -> Proxy | None:
    """Return the proxy for calls to a target; None if there is none."""
    variable = _first_set_variable(_PROXY_VARIABLES)
    if not variable or is_local(target) or _is_excepted(host_of(target)):
        return None
    url = urlsplit(os.environ[variable])
    if url.scheme != "http":  # gRPC supports no others
        return None
    return Proxy(url.netloc.rpartition("@")[2], variable)


def _is_excepted(host: str) -> bool:
    variable = _first_set_variable(_NO_PROXY_VARIABLES)
    listed = os.environ[variable].split(",") if variable else []
    return any(_covers(entry.strip(), host) for entry in listed)


def _covers(entry: str, host: str) -> bool:
    """Return whether an entry is a suffix of a host's name, or a network that contains its address."""
    if not entry:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())


def _first_set_variable(variables: tuple[str, ...]) -> str:
    """Return the name of the first variable that is set; empty if none is set, or if its value is empty."""
    for variable in variables:
        if variable in os.environ:
            return variable if os.environ[variable] else ""
    return ""
