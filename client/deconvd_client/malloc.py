"""How the process's memory allocator learns that megabytes come and go."""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = ["learn_large_blocks"]

_LARGE_BYTES: Final = 31 << 20
"""Just below what glibc learns from at most."""


def learn_large_blocks() -> None:
    """Let glibc keep the memory of freed messages for the next ones.

    It does so by itself for blocks up to the largest that a program has freed; until then it
    returns each freed megabyte to the kernel, which zeroes it anew: a tenth of a large call's time.
    So free a large block, which was never touched and costs nothing. Other C libraries are left as
    they are, and so is a glibc that was told otherwise (`mallopt`).
    """
    np.empty(_LARGE_BYTES, np.uint8)
