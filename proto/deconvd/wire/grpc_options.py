"""How both ends of a gRPC connection are tuned for tensors."""

from __future__ import annotations

from typing import Final

__all__ = ["GRPC_OPTIONS", "has_authority", "unix_path"]

GRPC_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.optimization_target", "throughput"),
    # The largest that HTTP/2 allows: a chunk is one frame.
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    # What may be under way before its receiver has asked for it.
    ("grpc.http2.lookahead_bytes", 64 << 20),
)
"""Channel and server options, chosen by measurement: see benchmarks/results."""


def unix_path(address: str) -> str:
    """Return the path of an address of the form ``unix:path`` or ``unix:///path``; empty if it is another."""
    return address.removeprefix("unix:").removeprefix("//") if address.startswith("unix:") else ""


def has_authority(address: str) -> bool:
    """Return whether an address has the form ``unix://host/path``, which gRPC refuses."""
    return address.startswith("unix://") and not address.startswith("unix:///")
