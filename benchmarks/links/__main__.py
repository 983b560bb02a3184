"""The command `python -m benchmarks.links`: prints a table and writes the rows as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from benchmarks.commit import commit
from benchmarks.links.long import long_rows
from benchmarks.links.rows import LinkRow
from benchmarks.links.slow import slow_rows

_MEASUREMENTS: Final[Mapping[str, Callable[[], Iterator[LinkRow]]]] = {
    "slow": slow_rows,
    "long": long_rows,
}


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--only", "names", type=click.Choice(list(_MEASUREMENTS)), multiple=True)
def main(json_file: Path | None, names: Sequence[str]) -> None:
    """Time calls on slow and on long links, each beside a bare program on the same link."""
    print(
        f"{'Gbit/s':>7} {'trip, ms':>8} {'call':44} {'ms':>9} {'floor, ms':>9} {'ratio':>6} {'trips':>7}"
    )
    rows: list[LinkRow] = []
    for name in names or _MEASUREMENTS:
        for row in _MEASUREMENTS[name]():
            rows.append(row)
            print(row, flush=True)
    if json_file is not None:
        about = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


if __name__ == "__main__":
    main()
