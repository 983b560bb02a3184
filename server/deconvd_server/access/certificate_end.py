"""Reads when a certificate ends. gRPC hands certificates over as they are, and Python's `ssl` reads only its own."""

from __future__ import annotations

import math
import ssl
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

__all__ = ["certificate_end_s"]

_VERSION: Final = 0xA0
"""The tag of the only element that may be missing before the validity. See RFC 5280, 4.1."""

_UTC_TIME: Final = 0x17
"""The tag of a time whose year has two digits: 50 is 1950, and 49 is 2049."""

_BEFORE_VALIDITY_COUNT: Final = 3
"""The serial number, the algorithm of the signature, and the issuer."""


@lru_cache(maxsize=256)
def certificate_end_s(pem: bytes) -> float:
    """Return until when a certificate in PEM is valid, in seconds of the wall clock since 1970.

    One that cannot be read has ended: nobody knows until when it counts.
    """
    try:
        return _read_end_s(ssl.PEM_cert_to_DER_cert(pem.decode()))
    except (ValueError, IndexError):
        return -math.inf


def _read_end_s(der: bytes) -> float:
    _, at, _ = _read_head(der, 0)  # the certificate
    _, at, _ = _read_head(der, at)  # what is signed of it
    tag, _, end = _read_head(der, at)
    if tag == _VERSION:
        at = end
    for _ in range(_BEFORE_VALIDITY_COUNT):
        _, _, at = _read_head(der, at)
    _, at, _ = _read_head(der, at)  # the validity
    _, _, at = _read_head(der, at)  # its begin
    tag, begin, end = _read_head(der, at)
    text = der[begin:end].decode()
    if tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _read_head(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the element at an offset, and where its content begins and ends."""
    size, begin = der[at + 1], at + 2
    if size & 0x80:  # the size has more bytes, and this is how many
        after = begin + (size & 0x7F)
        size, begin = int.from_bytes(der[begin:after]), after
    return der[at], begin, begin + size
