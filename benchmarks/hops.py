"""Through how many functions and files a call goes: ``python -m benchmarks.hops --json FILE``.

A client calls a server in another process, which computes on the processor. A warm call, the fourth, is counted on both
sides: the Python functions called in all threads, the files that they are of, and the stays. A stay is an uninterrupted
run of functions of one file in one thread. Only files of deconvd itself count; busy polling and the processor's work on
the elements are left out. How often a stream waits for bytes is chance, so there are a few such calls, and of each side
the one with the fewest functions stands in the table. ``--files`` prints the files, too, in the order in which the call
comes to them, each with the number of its stays where there are several.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import click
import numpy as np

import deconvd_client
from benchmarks.commit import commit
from benchmarks.profiled import start_profiling
from deconvd.host.startup_line import address_in_startup_line

_WARM_UPS = 3
_CALLS_COUNT = 5
_SETTLE_S = 0.1
"""How long both sides are given after a call to be done with it."""

_WIDTH = 120


@dataclass(frozen=True)
class CallPath:
    """A way for calls: the arguments of `connect`, and the shape of x. W has 2 KiB, and y twice as many bytes as x."""

    name: str
    transport: str
    shape: tuple[int, int, int, int]


CALL_PATHS = (
    CallPath("shared_memory", "shared_memory", (8, 8, 32, 32)),  # 256 KiB
    CallPath("tcp_message", "tcp", (7, 8, 8, 8)),  # 14 KiB
    CallPath("tcp_stream", "tcp", (8, 8, 128, 256)),  # 8 MiB, and 24 with y: four slices
    CallPath("grpc_message", "grpc", (7, 8, 8, 8)),
    CallPath("grpc_stream", "grpc", (8, 8, 128, 256)),
)


@dataclass(frozen=True)
class HopRow:
    """One side of a way; its fields are those of the JSON file.

    Attributes:
        chain: The module of each stay, in order: those of the thread that began first come first.
    """

    way: str
    side: str
    python_calls: int
    files: int
    stays: int
    chain: Sequence[str]

    def __str__(self) -> str:
        return f"{self.way:14} {self.side:7} {self.python_calls:13} {self.files:6} {self.stays:6}"

    @property
    def diagram(self) -> str:
        """The files in the order in which the call comes to them, and how often where that is more than once."""
        own = f"deconvd_{self.side}."
        links = (
            module.removeprefix(own) + (f"({stays})" if stays > 1 else "")
            for module, stays in Counter(self.chain).items()
        )
        lead = " " * 4
        return textwrap.fill(
            " - ".join(links),
            _WIDTH,
            initial_indent=lead,
            subsequent_indent=lead,
            break_long_words=False,
            break_on_hyphens=False,
        )


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--way", "names", type=click.Choice([way.name for way in CALL_PATHS]), multiple=True)
@click.option("--files", "draws", is_flag=True, help="Print the files that the call goes through.")
def main(json_file: Path | None, names: Sequence[str], *, draws: bool) -> None:
    """Count the functions and files that a call goes through, on both sides of each way."""
    print(f"{'way':14} {'side':7} {'Python calls':>13} {'files':>6} {'stays':>6}")
    rows: list[HopRow] = []
    with _server() as server:
        for way in CALL_PATHS:
            for row in _rows(server, way) if way.name in (names or way.name) else ():
                rows.append(row)
                print(row)
                if draws:
                    print(row.diagram)
    if json_file is not None:
        about = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


@dataclass(frozen=True)
class _Server:
    """A server in another process that is told when to begin to record, and when to end."""

    process: subprocess.Popen[str]
    unix_target: str
    tcp_target: str

    def begin(self) -> None:
        self._ask("begin")

    def end(self) -> list[list[str]]:
        threads: list[list[str]] = json.loads(self._ask("end"))
        return threads

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()


@contextmanager
def _server() -> Iterator[_Server]:
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder:
        addresses = (f"unix:{folder}/deconvd.sock", "127.0.0.1:0")
        options = ["--device", "cpu", "--log-level", "warning"]
        options += [f"--listen={address}" for address in addresses]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.profiled", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                assert process.stdout is not None
                lines = [process.stdout.readline() for _ in addresses]
                yield _Server(process, *map(address_in_startup_line, lines))
            finally:
                process.kill()


def _rows(server: _Server, way: CallPath) -> Iterator[HopRow]:
    target = server.unix_target if way.transport == "shared_memory" else server.tcp_target
    x, W = np.ones(way.shape, np.float32), np.ones((8, 4, 4, 4), np.float32)
    with start_profiling() as profile, deconvd_client.connect(target, transport=way.transport) as F:

        def call() -> None:
            F.deconvolution_2d(x, W, stride=2, pad=1)
            time.sleep(_SETTLE_S)

        for _ in range(_WARM_UPS):
            call()
        client_rows: list[HopRow] = []
        server_rows: list[HopRow] = []
        for _ in range(_CALLS_COUNT):
            server.begin()
            profile.begin()
            call()
            client_rows.append(_row(way, "client", profile.end()))
            server_rows.append(_row(way, "server", server.end()))
    for rows in (client_rows, server_rows):
        yield min(rows, key=lambda row: row.python_calls)


def _row(way: CallPath, side: str, threads: Sequence[Sequence[str]]) -> HopRow:
    stays = [module for modules in threads for module, _ in groupby(modules)]
    calls_count = sum(map(len, threads))
    return HopRow(way.name, side, calls_count, len(set(stays)), len(stays), stays)


if __name__ == "__main__":
    main()
