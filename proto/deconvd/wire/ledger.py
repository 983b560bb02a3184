"""The ledger of a call, which says where its time went on the server, as text in gRPC's trailing metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["METADATA_KEY", "OVERLAP_ENTRY", "ledger_from_metadata", "parse_ledger"]

METADATA_KEY: Final = "deconvd-ledger"
"""The metadata's key. The value is ``name=integer`` pairs, separated by ``;``. Each name ends with the unit."""

OVERLAP_ENTRY: Final = "follow_us"
"""In an overlapped call: how long the device waited for operands (see `deconvd.direct.protocol`).

The client decides by it whether overlapping pays off.
"""


def ledger_from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the ledger in trailing metadata, as text. Empty if the metadata has no ledger."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str):
            return value
    return ""


def parse_ledger(text: str) -> dict[str, int]:
    """Return the entries of a ledger by name. Malformed entries are ignored."""
    pairs = (pair.partition("=") for pair in text.split(";"))
    return {name: int(number) for name, _, number in pairs if number.isdigit()}
