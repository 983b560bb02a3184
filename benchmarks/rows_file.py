"""JSON files of rows that can be measured in parts: each run adds its rows to those that the file has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

__all__ = ["load_rows", "save_rows"]


def load_rows(path: Path | None, about: Mapping[str, object]) -> list[dict[str, Any]]:
    """Return the rows of a file, each as its fields. There are none if there is no file.

    Args:
        path: Where the file is, or will be. None: rows are only collected.
        about: What is measured, on what: of all rows of the file.

    Raises:
        click.UsageError: The file has rows of something else.
    """
    if path is None or not path.exists():
        return []
    file = json.loads(path.read_text())
    for name, value in about.items():
        if file[name] != value:
            raise click.UsageError(
                f"--json: {path} has rows of the {name} {file[name]}, not {value}: choose another file"
            )
    rows: list[dict[str, Any]] = file["rows"]
    return rows


def save_rows(path: Path | None, about: Mapping[str, object], rows: Iterable[Any]) -> None:
    """Write a file of rows, which are instances of a dataclass, with what they are about and the date."""
    if path is None:
        return
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = {**about, "date": date, "rows": [*map(asdict, rows)]}
    path.write_text(json.dumps(content, indent=1) + "\n")
