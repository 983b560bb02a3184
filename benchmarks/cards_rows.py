"""The rows of `benchmarks.cards`, and the file that collects them from several runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows_file import load_rows, save_rows

__all__ = ["CardsFile", "CardsRow"]


class _Key(NamedTuple):
    """What a row is of: two rows with the same key are two measurements of one thing."""

    cards: int
    layer: str
    dtype: str
    operands: str
    clients: int


@dataclass(frozen=True)
class CardsRow:
    """The calls of one layer by some clients at once; its fields are those of the JSON file.

    Attributes:
        cards: On how many cards the server computes.
        operands: ``plain`` arrays, or arrays from `F.empty`.
        clients: The number of client processes.
        calls_per_s: What all clients reach together.
        floor_calls_per_s: The same of the bare program. See `benchmarks.bare_cards`.
    """

    cards: int
    layer: str
    dtype: str
    operands: str
    clients: int
    calls_per_s: float
    floor_calls_per_s: float

    @property
    def key(self) -> _Key:
        """What the row is of."""
        return _Key(self.cards, self.layer, self.dtype, self.operands, self.clients)


class CardsFile:
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
        rows = [CardsRow(**row) for row in load_rows(path, about)]
        self._rows = {row.key: row for row in rows}

    def add(self, row: CardsRow) -> str:
        """Add a row, write the file, and return the row in words, beside the same with one card if there is that."""
        self._rows[row.key] = row
        save_rows(self._path, self._about, self._rows.values())
        return self._describe(row)

    def _describe(self, row: CardsRow) -> str:
        words = (
            f"{row.cards} cards {row.layer:24} {row.dtype:8} {row.operands:6}{row.clients:3} clients: "
            f"{row.calls_per_s:8.1f} calls/s, {row.calls_per_s / row.floor_calls_per_s:5.2f} of the floor"
        )
        one = self._rows.get(row.key._replace(cards=1))
        if one is None or row.cards == 1:
            return words
        ours, floor = (
            getattr(row, name) / getattr(one, name) for name in ("calls_per_s", "floor_calls_per_s")
        )
        return f"{words}; {ours:.2f} times one card, the floor {floor:.2f} times"
