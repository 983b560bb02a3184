"""The schema keeps buf's rules and the promises it has made, and the committed stubs are its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.javascript import BUF, node

_ROOT = Path(__file__).parents[1]
_PROTO = _ROOT / "proto"
_LANDED = _PROTO / "landed.binpb"
_SCHEMA = "deconvd/v1/deconvd.proto"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of proto/ that holds the schema and buf's configuration alone."""
    (tmp_path / _SCHEMA).parent.mkdir(parents=True)
    for name in ("buf.yaml", _SCHEMA):
        shutil.copy(_PROTO / name, tmp_path / name)
    return tmp_path


def test_the_schema_passes_bufs_standard_lint() -> None:
    ended = node(BUF, "lint", _PROTO)

    assert ended.returncode == 0, ended.stdout


def test_lint_finds_a_planted_fault(copy: Path) -> None:
    _edit(copy / _SCHEMA, "message Pair {\n  int64 h = 1;", "message Pair {\n  int64 H = 1;")

    ended = node(BUF, "lint", copy)

    assert ended.returncode
    assert "should be lower_snake_case" in ended.stdout


def test_the_schema_breaks_nothing_that_has_landed() -> None:
    ended = node(BUF, "breaking", _PROTO, "--against", _LANDED)

    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    ("landed", "planted"),
    [
        ("Tensor b = 3;", "Tensor b = 7;"),  # a new number
        ("Tensor b = 3;", "Tensor bias = 3;"),  # a new name
        ("int64 threads_count = 4;", "uint64 threads_count = 4;"),  # a new type
        ("rpc GetServerInfo(", "rpc DescribeServer("),  # a call gone
    ],
)
def test_a_planted_break_is_found(copy: Path, landed: str, planted: str) -> None:
    _edit(copy / _SCHEMA, landed, planted)

    ended = node(BUF, "breaking", copy, "--against", _LANDED)

    assert ended.returncode
    assert "deconvd.proto" in ended.stdout


def test_a_new_field_breaks_nothing(copy: Path) -> None:
    _edit(copy / _SCHEMA, "Tensor b = 3;", "Tensor b = 3;\n  Tensor c = 600;")

    ended = node(BUF, "breaking", copy, "--against", _LANDED)

    assert ended.returncode == 0, ended.stdout


def test_all_of_the_schema_is_guarded(tmp_path: Path) -> None:
    built = tmp_path / "built.binpb"
    ended = node(BUF, "build", _PROTO, "--exclude-source-info", "--output", built)

    assert ended.returncode == 0, ended.stdout
    same = built.read_bytes() == _LANDED.read_bytes()
    assert same, "the schema has grown: run `make accept-schema`"


def test_the_committed_stubs_are_what_the_schema_generates(tmp_path: Path) -> None:
    _make("generate", f"STUBS={tmp_path}")

    fresh = _stubs(tmp_path)
    assert len(fresh) == 4
    stale = [name for name, content in _stubs(_PROTO).items() if content != fresh[name]]
    assert not stale, "run `make generate`"


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def _make(target: str, *variables: str) -> None:
    """Run one of our make targets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ended = subprocess.run(
        ["make", target, *variables],
        cwd=_ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _stubs(directory: Path) -> dict[str, bytes]:
    """Return the contents of the generated files, by their paths."""
    paths = sorted(directory.glob("deconvd/v1/*_pb2*"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
