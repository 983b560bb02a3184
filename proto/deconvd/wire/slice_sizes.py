"""The sizes of a stream's slices: what clients send, and what every server accepts."""

from __future__ import annotations

from typing import Final

__all__ = ["MAX_SLICE_BYTES", "SLICE_BYTES"]

SLICE_BYTES: Final = 8 << 20
"""Size of the operands and results of a slice that a client makes if the link is fast, or its rate unknown.

Large enough to keep a GPU busy, and small enough to overlap with the next slice. On slow links slices are smaller.
"""

MAX_SLICE_BYTES: Final = 64 << 20
"""The largest slice that every server accepts, so that clients need not ask first."""
