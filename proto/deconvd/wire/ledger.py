"""The ledger of a call, which says where its time went on the server, as text in gRPC's trailing metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["METADATA_KEY", "OVERLAP_ENTRY", "ledger_from_metadata", "parse_ledger"]

METADATA_KEY: Final = "deconvd-ledger"
"""The metadata's key. The value is ``name=integer`` pairs, separated by ``;``. Each name ends with the unit."""

OVERLAP_ENTRY: Final = "follow_us"
"""How long the device waited for operands while it uploaded and computed others (see `deconvd.direct.protocol`).

The entry exists only if the device overlapped the call. So it tells the client whether overlapping has paid off.
"""

_NUMBER: Final = re.compile("[0-9]{1,18}")
"""The numbers of a ledger. Digits of other scripts, and thousands of digits, are not numbers to `int`."""


def ledger_from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the ledger in trailing metadata, as text. Empty if the metadata has no ledger."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str):
            return value
    return ""


def parse_ledger(text: str) -> dict[str, int]:
    """Return the entries of a ledger by name. Malformed entries are ignored."""
    pairs = (pair.partition("=") for pair in text.split(";"))
    return {name: int(number) for name, _, number in pairs if _NUMBER.fullmatch(number)}
