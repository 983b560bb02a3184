"""The lines that deconvd-server prints once it can serve, which programs read to learn its addresses.

The log says who may call in the same words.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "address_in_startup_line",
    "describe_address",
    "health_line",
    "metrics_line",
    "startup_line",
]

_PREFIX: Final = "deconvd-server: listening on "


def describe_address(address: str, callers: str) -> str:
    """Return an address, and who may call there, for people."""
    return f"{address} ({callers})"


def startup_line(address: str, callers: str) -> str:
    """Return the line for an address.

    Args:
        callers: Who may call there, for people.
    """
    return f"{_PREFIX}{describe_address(address, callers)}"


def health_line(address: str) -> str:
    """Return the line for an address that serves health alone."""
    return f"deconvd-server: health alone on {describe_address(address, 'not encrypted; for everyone')}"


def metrics_line(address: str, readers: str) -> str:
    """Return the line for an address that serves metrics.

    Args:
        readers: Who may read them, for people.
    """
    return f"deconvd-server: metrics on {describe_address(address, readers)}"


def address_in_startup_line(line: str) -> str:
    """Return the address in a line.

    Raises:
        ValueError: It is another line.
    """
    address, parenthesis, _ = line.removeprefix(_PREFIX).rpartition(" (")
    if not line.startswith(_PREFIX) or not parenthesis:
        raise ValueError(
            f"a line that says where deconvd-server listens was expected, got {line!r}"
        )
    return address
