"""The rows of `benchmarks.remote`, and the file that collects them from several runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows_file import load_rows, save_rows

__all__ = ["FLOOR_PATH", "RemoteRow", "RemoteRowKey", "RowsFile", "merge_rows"]

FLOOR_PATH = "bare_4"


class RemoteRowKey(NamedTuple):
    """What a row is of: two rows with the same key are two measurements of one thing."""

    layer: str
    dtype: str
    clients: int
    path: str


@dataclass(frozen=True)
class RemoteRow:
    """The calls of one layer by some clients at once; its fields are those of the JSON file.

    Attributes:
        clients: The number of client processes.
        path: How they call: a transport of ours, or the bare program by 1 or 4 connections a call.
        ms: Latency of a call: the median of the clients' medians.
        gb_per_s: What x, W and y of all clients' calls have in a second, both ways together, in 10^9 bytes.
        floor_gb_per_s: The same of the bare program by 4 connections; None while it was not measured.
    """

    layer: str
    dtype: str
    clients: int
    path: str
    ms: float
    gb_per_s: float
    floor_gb_per_s: float | None = None

    @property
    def key(self) -> RemoteRowKey:
        """What the row is of."""
        return RemoteRowKey(self.layer, self.dtype, self.clients, self.path)

    def __str__(self) -> str:
        name = f"{self.layer:24} {self.dtype:8} {self.clients:3} {self.path:14}"
        times = f"{self.ms:9.3f} ms {self.gb_per_s:8.3f} GB/s"
        if self.floor_gb_per_s is None:
            return f"{name} {times}"
        return f"{name} {times} {self.gb_per_s / self.floor_gb_per_s:6.2f} of the floor"


def merge_rows(rows: Iterable[RemoteRow], new: Iterable[RemoteRow]) -> list[RemoteRow]:
    """Return all rows, new ones instead of those with the same key, each with its floor of today."""
    merged = {row.key: row for row in (*rows, *new)}
    floors = {key: row.gb_per_s for key, row in merged.items() if key.path == FLOOR_PATH}
    return [
        replace(row, floor_gb_per_s=floors.get(key._replace(path=FLOOR_PATH)))
        for key, row in merged.items()
    ]


class RowsFile:
    """A JSON file of rows. Each run adds its rows to those that the file has, or replaces them.

    Args:
        path: Where the file is, or will be. None: rows are only collected.
        about: What was measured, on what: of all rows of the file.

    Raises:
        click.UsageError: The file has rows of something else.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]) -> None:
        self._path = path
        self._about = dict(about)
        self.rows: Sequence[RemoteRow] = [RemoteRow(**row) for row in load_rows(path, about)]

    def add(self, row: RemoteRow) -> RemoteRow:
        """Add a row, write the file, and return the row with its floor."""
        self.rows = merge_rows(self.rows, [row])
        save_rows(self._path, self._about, self.rows)
        return next(each for each in self.rows if each.key == row.key)
