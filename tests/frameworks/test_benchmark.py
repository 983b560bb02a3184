"""The benchmark of adapters: each way computes the same, and a file keeps the rows of other environments."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.frameworks.__main__ import main


def test_a_frameworks_rows_join_those_of_another(tmp_path: Path) -> None:
    results = tmp_path / "frameworks.json"
    other = {"framework": "another", "what": "step"}
    results.write_text(json.dumps({"rows": [other]}))
    arguments = ["--time-s", "0.1", "--json", str(results)]

    for _ in range(2):  # the second time its own rows are replaced
        ended = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert ended.exit_code == 0, ended.output

    first, *rows = json.loads(results.read_text())["rows"]
    assert first == other
    assert [(row["what"], row["calls"]) for row in rows] == [("step", 4), ("infer", 2)]
    assert len({row["framework"] for row in rows}) == 1
    for row in rows:
        assert min(row["ours_ms"], row["plain_ms"], row["local_ms"]) > 0
    assert ended.output.count("ms a call") == 2
