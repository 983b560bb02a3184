"""The machine code of common kernels, which travels with deconvd: a file for each generation of cards.

compiled/sm_90.xz, once decompressed: a line of JSON, and the cubins that it lists, one after the other

`make kernels` writes the files (build_archive.py). A cubin runs on cards of its capability, and on most newer ones of
the same generation. Whether it is of the present text of a kernel its digest says, so a stale one is never taken.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["CAPABILITIES", "FOLDER", "digest_of", "has_cubins", "pack", "read_cubins"]

_FILES = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}
"""The files for cards, by compute capability times ten: A100, RTX 30, RTX 40 and L4; H100; B200, B300; RTX 50, GB10.

Not for Jetson (87, 110), whose cards are no kin of others."""

CAPABILITIES = tuple(dict.fromkeys(_FILES.values()))
"""The capabilities that there are files for."""

FOLDER = Path(__file__).parent / "compiled"


def digest_of(text: str, options: Sequence[str]) -> str:
    """Return the digest of all that a module's machine code depends on, other than the card and the compiler."""
    return hashlib.sha256("\0".join((text, *options)).encode()).hexdigest()


def has_cubins(capability: int) -> bool:
    """Return whether there are cubins for a card."""
    return _path(capability).exists()


def read_cubins(capability: int) -> Mapping[str, bytes]:
    """Return cubins for a card, by the digests of their kernels; none if there are none for it."""
    if not has_cubins(capability):
        return {}
    content = lzma.decompress(_path(capability).read_bytes())
    head, _, code = content.partition(b"\n")
    cubins, start = {}, 0
    for digest, size_bytes in json.loads(head)["cubins"]:
        cubins[digest] = code[start : start + size_bytes]
        start += size_bytes
    return cubins


def _path(capability: int) -> Path:
    return FOLDER / f"sm_{_FILES.get(capability, capability)}.xz"


def pack(cubins: Mapping[str, bytes], nvrtc: str) -> bytes:
    """Return the content of a file of cubins. It depends on nothing else, so it can be made again."""
    sizes = [(digest, len(cubin)) for digest, cubin in cubins.items()]
    head = json.dumps({"nvrtc": nvrtc, "cubins": sizes}).encode()
    return lzma.compress(head + b"\n" + b"".join(cubins.values()), preset=9 | lzma.PRESET_EXTREME)
