"""gRPC options for both ends, tuned for large tensors, and the forms of addresses."""

from __future__ import annotations

from typing import Final

__all__ = ["GRPC_OPTIONS", "NOT_IN_UNIX_PATHS", "has_authority", "unix_path"]

GRPC_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.optimization_target", "throughput"),
    # The largest size that HTTP/2 allows, so that each chunk is one frame.
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    # How much a sender may send before the receiver has asked for it.
    ("grpc.http2.lookahead_bytes", 64 << 20),
)
"""Channel and server options, chosen by measurement: see benchmarks/results."""

NOT_IN_UNIX_PATHS: Final = frozenset("%?#,")
"""Letters that the path of a Unix socket cannot have: gRPC takes it for a URI, and a comma for the start of another."""


def unix_path(address: str) -> str:
    """Return the path in an address of the form ``unix:path`` or ``unix:///path``. Empty for other addresses."""
    return address.removeprefix("unix:").removeprefix("//") if address.startswith("unix:") else ""


def has_authority(address: str) -> bool:
    """Return whether an address has the form ``unix://host/path``, which gRPC rejects."""
    return address.startswith("unix://") and not address.startswith("unix:///")
