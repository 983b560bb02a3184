"""The ledger of a call: where its time went on the server, as a line of gRPC's trailing metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["METADATA_KEY", "OVERLAP_ENTRY", "ledger_from_metadata", "parse_ledger"]

METADATA_KEY: Final = "deconvd-ledger"
"""Its value is ``name=integer`` pairs, separated by ``;``; each name ends in its unit."""

OVERLAP_ENTRY: Final = "follow_us"
"""What of an early call tells whether it was worth it: see `deconvd.direct.protocol`."""


def ledger_from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the ledger in trailing metadata, as text; empty if there is none."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str):
            return value
    return ""


def parse_ledger(text: str) -> dict[str, int]:
    """Return the entries of a ledger, by name. What is none is left out."""
    pairs = (pair.partition("=") for pair in text.split(";"))
    return {name: int(number) for name, _, number in pairs if number.isdigit()}
