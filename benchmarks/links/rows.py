"""One measurement on a link."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinkRow"]


@dataclass(frozen=True)
class LinkRow:
    """One kind of call on one link. Its fields are those of the JSON file.

    Attributes:
        rate_gbit: The rate of the link in each direction, in Gbit/s. None if it is not bounded.
        round_trip_ms: The time that the link itself adds to a round trip.
        what: The call, and the transport that carries it.
        ms: How long the call takes, the median.
        floor_ms: How long a bare program takes on the same link in the same run. On a slow link that is a socket that
            sends the bytes of the larger direction, one way. On a long link it is an echo of the same bytes.
        round_trips: `ms` in round trips of the link. None on a slow link.
    """

    rate_gbit: float | None
    round_trip_ms: float
    what: str
    ms: float
    floor_ms: float
    round_trips: float | None

    def __str__(self) -> str:
        rate = "-" if self.rate_gbit is None else f"{self.rate_gbit:g}"
        trips = "-" if self.round_trips is None else f"{self.round_trips:.1f}"
        ratio = self.ms / self.floor_ms
        return (
            f"{rate:>7} {self.round_trip_ms:8.1f} {self.what:44} {self.ms:9.1f} {self.floor_ms:9.1f} {ratio:6.2f} "
            f"{trips:>7}"
        )
