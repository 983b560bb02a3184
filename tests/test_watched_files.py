"""Files that are read again when they change: soon enough, never halfway, and with one line in the log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from deconvd.host.watched_files import WatchedFiles


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files looked at whenever they are asked for."""
    monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def watch(*paths: Path) -> WatchedFiles[list[int]]:
    return WatchedFiles(paths, lambda: [int(path.read_text()) for path in paths])


def replace(path: Path, text: str) -> None:
    staged = path.with_suffix(".new")
    staged.write_text(text)
    os.replace(staged, path)


def test_what_does_not_change_stays_the_same_object(path: Path) -> None:
    files = watch(path)

    assert files.current() == [1]
    assert files.current() is files.current()


def test_a_file_that_is_replaced_is_read_again(path: Path) -> None:
    files = watch(path)
    files.current()

    replace(path, "2")

    assert files.current() == [2]


def test_a_replaced_file_with_the_size_and_the_time_of_the_former_is_seen(path: Path) -> None:
    files, former = watch(path), path.stat()

    path.write_text("2")  # the same file, of the same size
    os.utime(path, ns=(former.st_atime_ns, former.st_mtime_ns))

    assert files.current() == [2]


def test_files_are_looked_at_once_in_a_period(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 3600.0)
    files = watch(path)

    replace(path, "2")

    assert files.current() == [1]


def test_what_cannot_be_parsed_now_is_an_error_at_first(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch(path, tmp_path / "absent")
    path.write_text("x")
    with pytest.raises(ValueError, match="invalid literal"):
        watch(path)


def test_what_changes_while_it_is_read_counts_once_it_has_been_read_as_a_whole(
    path: Path, tmp_path: Path
) -> None:
    other, changes = tmp_path / "other", ["2"]
    other.write_text("1")

    def parse() -> list[int]:
        first = int(path.read_text())
        if other.read_text() == "2" and changes:
            replace(path, changes.pop())
        return [first, int(other.read_text())]

    files = WatchedFiles([path, other], parse)
    replace(other, "2")

    assert files.current() == [1, 1]
    assert files.current() == [2, 2]


def test_a_pipe_that_nobody_writes_into_is_not_waited_for(path: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe: it must be a regular file"):
        watch(pipe)

    files = watch(path)
    os.replace(pipe, path)

    assert files.current() == [1]


def test_what_was_there_before_counts_until_all_files_match(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deconvd.host.watched_files")
    other = tmp_path / "other"
    other.write_text("1")
    files = watch(path, other)

    other.unlink()
    replace(path, "2")
    assert [files.current() for _ in range(3)] == [[1, 1]] * 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        f"{path}, {other} cannot be used, and what was there before still counts: "
        in record.message
    )

    other.write_text("2")
    assert files.current() == [2, 2]
    assert caplog.records[1].message == f"{path}, {other} was read again"
    assert len(caplog.records) == 2


def test_files_that_could_not_be_read_for_a_moment_are_tried_again(path: Path) -> None:
    failures = [OSError("no descriptor is left")]

    def parse() -> str:
        text = path.read_text()
        if text == "2" and failures:
            raise failures.pop()
        return text

    files = WatchedFiles([path], parse)
    replace(path, "2")

    assert files.current() == "1"
    assert files.current() == "2"  # though the file has not changed since
