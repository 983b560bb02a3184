"""Digests are BLAKE3's, whatever the size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from deconvd.wire.digest import digest_of

# from the test vectors at https://github.com/BLAKE3-team/BLAKE3: bytes 0, 1, ..., 250, 0, 1, ...
KNOWN = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


@pytest.mark.parametrize("size_bytes", KNOWN)
def test_known_bytes_have_their_known_digest(size_bytes: int) -> None:
    elements = (np.arange(size_bytes) % 251).astype(np.uint8)

    digest = digest_of(elements)

    assert digest.blake3.hex() == KNOWN[size_bytes]
    assert digest.size_bytes == size_bytes


def test_a_large_array_has_the_digest_that_one_thread_gives_it() -> None:
    x = np.random.default_rng(0).standard_normal(2 << 20)
    script = "import sys, blake3; print(blake3.blake3(sys.stdin.buffer.read()).hexdigest())"

    done = subprocess.run(
        [sys.executable, "-c", script], input=x.tobytes(), capture_output=True, check=True
    )

    assert digest_of(x).blake3.hex() == done.stdout.decode().strip()
    assert digest_of(x.astype(">f8")) == digest_of(x)
