"""What was measured, and how it compares with what is wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.transport.timing import human

__all__ = ["SMALL_BYTES", "SecureRow", "comparisons"]

SMALL_BYTES: Final = 1 << 20
"""Below this size it is microseconds that count, and from it on ratios."""

_MOST_RATIO: Final = 1.15
_MOST_MORE_US: Final = 20


@dataclass(frozen=True)
class SecureRow:
    """What a round trip takes by one way.

    Attributes:
        path: As in `benchmarks.transport`.
        secured: ``plain``, ``token`` or ``tls``.
        bytes: The size of the tensor that is sent, and of the one that comes back.
        ms: The median.
        floor_ms: That of the bare program: with TLS if the row has it, at a Unix socket for paths within the host, and
            else by TCP.
    """

    path: str
    secured: str
    bytes: int
    ms: float
    floor_ms: float


def comparisons(rows: Sequence[SecureRow], hot_us: dict[int, float]) -> Iterator[str]:
    """Return lines that say what tokens and TLS cost, and what is wanted.

    Args:
        hot_us: What TLS adds to the bare program if it does nothing else, by sizes.
    """
    by_key = {(row.path, row.secured, row.bytes): row for row in rows}
    for row in rows:
        plain = by_key[row.path, "plain", row.bytes]
        name = f"{row.path}, {human(row.bytes)}"
        if row.secured == "token":
            yield (
                f"{name}: with a token {row.ms / plain.ms:.3f} of the time without "
                "(wanted: nothing measurable)"
            )
        elif row.secured == "tls":
            adds_ms, floor_adds_ms = row.ms - plain.ms, row.floor_ms - plain.floor_ms
            if row.path == "grpc_tcp":
                most_ms = _MOST_RATIO * plain.ms + floor_adds_ms
                yield (
                    f"{name}: with TLS {row.ms:.3f} ms (wanted: at most {most_ms:.3f}, which is "
                    f"{_MOST_RATIO} times {plain.ms:.3f} without, and {floor_adds_ms:.3f} more)"
                )
            elif row.bytes < SMALL_BYTES:
                yield (
                    f"{name}: TLS adds {adds_ms * 1e3:.1f} us, and to the bare program "
                    f"{floor_adds_ms * 1e3:.1f} ({hot_us[row.bytes]:.1f} if that does nothing "
                    f"else): {(adds_ms - floor_adds_ms) * 1e3:.1f} more "
                    f"(wanted: at most {_MOST_MORE_US})"
                )
            else:
                yield (
                    f"{name}: with TLS {row.ms / row.floor_ms:.3f} of the bare program "
                    f"(wanted: at most {_MOST_RATIO})"
                )
