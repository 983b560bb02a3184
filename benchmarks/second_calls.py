"""Why the second call of a shape takes longer than later ones: ``python -m benchmarks.second_calls --device cuda``.

Shapes are those of `benchmarks.new_shapes`. Each is called 8 times in a row in one of five ways:

    new       the shape is new to the server, and each result is dropped before the next call
    kept      the same, but the caller keeps each result until the next one is there, as ``y = f(x)`` in a loop does
    known     the shape is known, and the calls follow those of another known shape at once
    rested    the shape is known, and the client sleeps before the first call for as long as a first call takes
    spun      the same, but the client computes meanwhile instead of sleeping

Prints, for each call of a row, the medians of the milliseconds that the client has beyond the server's, of the
server's, and of the page faults of both processes. So ``new`` beside ``known`` shows what a new shape costs, ``rested``
what a wait costs whatever the shape, and ``kept`` what results cost that are still there.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

import deconvd_client
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.new_shapes import draw_shapes, make_operands, new_home
from deconvd_client import Connection
from examples.local_server import local_server

_CALLS_COUNT: Final = 8
_WAYS: Final = ("new", "kept", "known", "rested", "spun")
_PEER_CREDENTIALS: Final = struct.Struct("3i")
"""The value of SO_PEERCRED: process, user and group."""

_FAULTS_FIELD: Final = 7
"""The place of the minor faults in /proc/PID/stat, counted behind the program's name."""


@dataclass(frozen=True, slots=True)
class SecondCallsRow:
    """One way and one call; its fields are those of the JSON file, and each is a median over the shapes.

    Attributes:
        call: Which call of a shape, from 1.
        client_ms: What the client took beyond the server's part.
        server_ms: The server's part, as its ledger says it.
        client_faults, server_faults: Minor page faults of the two processes.
    """

    way: str
    call: int
    client_ms: float
    server_ms: float
    client_faults: float
    server_faults: float

    def __str__(self) -> str:
        return (
            f"{self.way:8} {self.call:4} {self.client_ms:10.3f} {self.server_ms:10.3f} "
            f"{self.client_faults:8.0f} {self.server_faults:8.0f}"
        )


_HEADER: Final = (
    f"{'way':8} {'call':>4} {'client ms':>10} {'server ms':>10} {'faults':>8} {'of srv':>8}"
)


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--shapes", "count", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--type", "dtype", default="float32", show_default=True)
@click.option("--op", type=click.Choice(["y", "grad"]), default="y", show_default=True)
@click.option("--pause-ms", type=click.FloatRange(min=0), default=12, show_default=True)
def main(
    device: str, json_file: Path | None, count: int, dtype: str, op: str, pause_ms: float
) -> None:
    """Make the calls and print the rows."""
    print(_HEADER, flush=True)
    rows: list[SecondCallsRow] = []
    shapes = draw_shapes(2 * count)
    with new_home(), local_server(device) as target:
        server = _process_at(target)
        with deconvd_client.connect(target, transport="shared_memory", timeout_s=120) as F:
            for way in _WAYS:
                # ways of new shapes must not share them; the others take those that the first way has made known
                some = shapes[count:] if way == "kept" else shapes[:count]
                rows += _rows(F, way, op, dtype, some, pause_ms / 1e3, server)
                print(*rows[-_CALLS_COUNT:], sep="\n", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(_report(device, dtype, op, rows), indent=1) + "\n")


def _report(
    device: str, dtype: str, op: str, rows: Sequence[SecondCallsRow]
) -> Mapping[str, object]:
    return {
        "card": card_name(device),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": dtype,
        "op": op,
        "rows": [asdict(row) for row in rows],
    }


def _process_at(target: str) -> int:
    """Return the process that listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(target.removeprefix("unix:"))
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
        )
    process, _, _ = _PEER_CREDENTIALS.unpack(credentials)
    return int(process)


def _faults_count(process: int) -> int:
    behind_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    return int(behind_name.split()[_FAULTS_FIELD])


def _rows(
    F: Connection,
    way: str,
    op: str,
    dtype: str,
    shapes: Sequence[tuple[int, int]],
    pause_s: float,
    server: int,
) -> Iterator[SecondCallsRow]:
    of_shapes = [[*_measure_calls(F, way, op, dtype, size, pause_s, server)] for size in shapes]
    for number, of_call in enumerate(zip(*of_shapes, strict=True), 1):
        medians = [round(statistics.median(values), 3) for values in zip(*of_call, strict=True)]
        yield SecondCallsRow(way, number, *medians)


def _measure_calls(
    F: Connection,
    way: str,
    op: str,
    dtype: str,
    size: tuple[int, int],
    pause_s: float,
    server: int,
) -> Iterator[tuple[float, float, int, int]]:
    """Yield, for each call of a shape, what `SecondCallsRow` has."""
    x, W, gy = make_operands(size, dtype)

    def call() -> object:
        if op == "y":
            return F.deconvolution_2d(x, W, None, 2, 1)
        return F.deconvolution_2d_grad(x, W, None, gy, 2, 1)

    kept: object = None
    if way in ("known", "rested", "spun"):
        for _ in range(_CALLS_COUNT):
            call()
    _PAUSES.get(way, _do_not_pause)(pause_s)
    for _ in range(_CALLS_COUNT):
        faults = _faults_count(os.getpid()), _faults_count(server)
        begin_s = time.perf_counter()
        result = call()
        if way == "kept":
            kept = result
        del result
        took_ms = (time.perf_counter() - begin_s) * 1e3
        server_ms = F.last_ledger["server_us"] / 1e3
        after = _faults_count(os.getpid()), _faults_count(server)
        yield took_ms - server_ms, server_ms, after[0] - faults[0], after[1] - faults[1]
    del kept


def _do_not_pause(_: float) -> None:
    pass


def _spin(pause_s: float) -> None:
    end_s = time.perf_counter() + pause_s
    while time.perf_counter() < end_s:
        pass


_PAUSES: Final[Mapping[str, Callable[[float], None]]] = {"rested": time.sleep, "spun": _spin}


if __name__ == "__main__":
    main()
