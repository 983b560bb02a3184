"""How hashing and failures fare with many servers: ``python -m benchmarks.fleet --json FILE``.

It simulates clients of up to a thousand servers. They decide by the client's own `Balancer`, and no call is made. For
each number of servers it says how evenly filters are spread, what a dead server's filters become, how often calls are
tried again because of it, and how long a decision takes.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks.commit import commit
from deconvd.errors import UnavailableError
from deconvd_client.calls.cancel_scope import CancelScope
from deconvd_client.server_set.balancer import Balancer, Member, Preference, RunningAttempt

_CALL_BYTES = 1 << 20
_DEATHS_COUNT = 5
_LATER_COUNT = 200


@dataclass(frozen=True)
class FleetRow:
    """What a number of servers do; its fields are those of the JSON file.

    Attributes:
        busiest: How many filters the server with most of them has, as a multiple of the mean.
        moved_share: The part of all filters that has another server when one has died, in the mean of several deaths.
        moved_in_vain: How many filters of other servers have moved then: none should.
        heirs: How many servers share the dead one's filters.
        retries: How many of a client's calls are tried again for each death: one, which finds it dead, if calls come
            one after the other.
        lost: Calls that found no server.
        first_choice_us: How long the first decision for a filter takes, in microseconds.
        choice_us: How long later ones take.
    """

    servers: int
    filters: int
    busiest: float
    moved_share: float
    moved_in_vain: int
    heirs: float
    retries: float
    lost: int
    first_choice_us: float
    choice_us: float

    def __str__(self) -> str:
        return (
            f"{self.servers:5} servers: the busiest has {self.busiest:.2f} of the mean; when one dies, "
            f"{self.moved_share:.2%} of the filters move to {self.heirs:.0f} others, and {self.moved_in_vain} in vain; "
            f"{self.retries:.2f} calls of a client are tried again, and {self.lost} are lost; "
            f"{self.first_choice_us:.0f} us to choose at first, and {self.choice_us:.0f} later"
        )


class _Client:
    """A client that knows some servers, of which some are dead."""

    def __init__(self, servers_count: int) -> None:
        self._balancer: Balancer[None] = Balancer()
        for number in range(servers_count):
            self._balancer.add(Member(f"10.{number >> 8}.{number & 255}.1:50051".encode(), None))
        self.retries_count = 0
        self.lost_count = 0

    def call(self, key: bytes, dead: bytes | None) -> bytes | None:
        """Return the server that serves a call with a filter; None if there is none."""
        vain: list[Member[None]] = []
        while True:
            attempt = RunningAttempt(CancelScope(), _CALL_BYTES, patience=1.0)
            member = self._balancer.begin(Preference(key), attempt, vain)
            if member is None:
                self.lost_count += 1
                return None
            self._balancer.end(member, attempt)
            if member.identity != dead:
                self._balancer.note_answer(member, 0.0)
                return member.identity
            self._balancer.note_failure(member, UnavailableError("it is dead"))
            vain.append(member)
            self.retries_count += 1

    def note_return(self, dead: bytes) -> None:
        """Note that a dead server is back."""
        member = self._balancer.find(dead)
        assert member is not None
        self._balancer.note_health(member)


@click.command()
@click.option(
    "--servers", "counts", type=int, multiple=True, default=(3, 8, 125, 1000), show_default=True
)
@click.option("--filters", "filters_count", default=10_000, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(counts: Sequence[int], filters_count: int, json_file: Path | None) -> None:
    """Simulate clients of many servers, some of which die."""
    rows: list[FleetRow] = []
    for count in counts:
        rows.append(_row(count, filters_count))
        print(rows[-1], flush=True)
    if json_file is not None:
        about = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


def _row(servers_count: int, filters_count: int) -> FleetRow:
    generator = random.Random(0)
    keys = [generator.randbytes(32) for _ in range(filters_count)]
    client = _Client(servers_count)
    began_s = time.perf_counter()
    before = {key: client.call(key, None) for key in keys}
    first_s = time.perf_counter() - began_s
    for _ in range(_LATER_COUNT):
        client.call(keys[-1], None)
    later_s = time.perf_counter() - began_s - first_s
    counts = Counter(before.values())
    moved_count = moved_in_vain_count = heirs_count = 0
    servers = sorted(filter(None, counts))
    dying = generator.sample(servers, min(_DEATHS_COUNT, len(servers)))
    for dead in dying:
        after = {key: client.call(key, dead) for key in keys}
        moved = [key for key in keys if after[key] != before[key]]
        moved_count += len(moved)
        moved_in_vain_count += sum(before[key] != dead for key in moved)
        heirs_count += len({after[key] for key in moved})
        client.note_return(dead)
    return FleetRow(
        servers=servers_count,
        filters=filters_count,
        busiest=max(counts.values()) * servers_count / filters_count,
        moved_share=moved_count / len(dying) / filters_count,
        moved_in_vain=moved_in_vain_count,
        heirs=heirs_count / len(dying),
        retries=client.retries_count / len(dying),
        lost=client.lost_count,
        first_choice_us=first_s / filters_count * 1e6,
        choice_us=later_s / _LATER_COUNT * 1e6,
    )


if __name__ == "__main__":
    main()
