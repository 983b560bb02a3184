"""What a process died at is not tried by the next: the processes and their deaths are real, the plans are not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deconvd_server.device.cuda.plans.journal import Journal
from tests.plan_searches import search, start_search
from tests.processes import wait_until

CRASHES = ["SIGFPE", "SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT"]
DAY_S = 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A plan store's folder."""
    return tmp_path / "store"


def journals(store: Path) -> list[Path]:
    return sorted((store / "journals").glob("*"))


def age(store: Path, *, by_s: float) -> None:
    """Let journals have been written that long ago."""
    for journal in journals(store):
        os.utime(journal, (time.time() - by_s,) * 2)


@pytest.mark.parametrize("death", [*CRASHES, "SIGKILL"])
def test_the_next_process_does_without_cudnn_for_what_the_last_one_died_at(
    store: Path, death: str
) -> None:
    deaths = {"cudnn 8": death}
    assert search(store, 8, deaths=deaths).exit_code == -signal.Signals[death]

    following = search(store, 8, 9, deaths=deaths)

    assert following.plans == {8: "own", 9: "cudnn"}
    assert following.exit_code == 0
    assert following.log.count("without cuDNN") == 1
    assert "y of Problem" in following.log
    assert search(store, 8, 9, deaths=deaths).plans == following.plans


@pytest.mark.parametrize("options", [{"autotune": True}, {"cudnn_deterministic": True}])
def test_nor_is_cudnn_asked_with_other_options(store: Path, options: dict[str, bool]) -> None:
    search(store, 8, deaths={"cudnn 8": "SIGFPE"})
    assert search(store, 8, options=options).plans == {8: "own"}


def test_a_process_that_dies_without_cudnn_leaves_the_most_general_plan(store: Path) -> None:
    deaths = {"cudnn 8": "SIGFPE", "own 8": "SIGSEGV"}
    for number in (signal.SIGFPE, signal.SIGSEGV):
        assert search(store, 8, deaths=deaths).exit_code == -number

    last = search(store, 8, 9, deaths=deaths)

    assert last.plans == {8: "fallback", 9: "cudnn"}
    assert "most general kernels" in last.log


def test_another_version_of_cudnn_is_asked_again(store: Path) -> None:
    search(store, 8, deaths={"cudnn 8": "SIGFPE"})
    assert search(store, 8, version=92000).plans == {8: "cudnn"}
    assert search(store, 8).plans == {8: "own"}


def test_without_a_store_nothing_is_remembered() -> None:
    for _ in range(2):
        assert search(None, 8, deaths={"cudnn 8": "SIGFPE"}).exit_code == -signal.SIGFPE


@pytest.mark.parametrize("death", CRASHES)
def test_after_a_crash_cudnn_is_never_asked_again(store: Path, death: str) -> None:
    search(store, 8, deaths={"cudnn 8": death})
    age(store, by_s=1000 * DAY_S)
    assert search(store, 8).plans == {8: "own"}


@pytest.mark.parametrize(
    ("death", "environment"),
    [("SIGKILL", {}), ("elsewhere", {}), ("SIGFPE", {"PYTHONFAULTHANDLER": "1"})],
    ids=["killed", "crashed elsewhere", "crashed, reported to standard error"],
)
def test_after_a_death_that_may_have_had_another_reason_cudnn_is_asked_again_the_next_day(
    store: Path, death: str, environment: dict[str, str]
) -> None:
    assert search(store, 8, deaths={"cudnn 8": death}, environment=environment).exit_code < 0
    age(store, by_s=0.9 * DAY_S)
    today = search(store, 8, options={"autotune": True})
    age(store, by_s=1.1 * DAY_S)
    tomorrow = search(store, 8)

    assert today.plans == {8: "own"}
    assert "for a day" in today.log
    assert tomorrow.plans == {8: "cudnn"}
    assert not tomorrow.log


def test_a_lost_card_is_a_death_too(store: Path) -> None:
    deaths = {"cudnn 8": "lost"}
    assert search(store, 8, deaths=deaths).exit_code == 3
    assert search(store, 8, 9, deaths=deaths).plans == {8: "own", 9: "cudnn"}


def test_a_search_that_fails_or_ends_leaves_nothing(store: Path) -> None:
    failed = search(store, 8, 9, deaths={"cudnn 8": "fail"})

    assert failed.plans == {8: "no plan", 9: "cudnn"}
    assert not failed.log
    assert not journals(store)
    assert search(store, 8).plans == {8: "cudnn"}


@pytest.fixture
def hanging(store: Path) -> Iterator[int]:
    """The id of a process that is searching for the width of 8, and hangs."""
    with start_search(store, 8, deaths={"cudnn 8": "hang"}) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hang\n"
            yield process.pid
        finally:
            process.kill()


def test_a_process_that_lives_has_not_died_of_its_search(store: Path, hanging: int) -> None:
    found = search(store, 8)

    assert found.plans == {8: "cudnn"}
    assert not found.log


def test_others_learn_of_a_death_while_they_live(store: Path, hanging: int) -> None:
    store.joinpath("journals").mkdir(exist_ok=True)
    journal = Journal(store / "journals")
    assert not journal.unfinished_work()
    os.kill(hanging, signal.SIGKILL)
    wait_until(lambda: len(journal.unfinished_work()) == 1)


def test_processes_that_share_a_store_do_not_disturb_each_other(store: Path, hanging: int) -> None:
    widths = range(10, 60)
    others = [start_search(store, *widths, options={"autotune": bool(n % 2)}) for n in range(4)]
    os.kill(hanging, signal.SIGKILL)
    for other in others:
        said, log = other.communicate(timeout=60)
        assert said.splitlines() == [f"{width} cudnn" for width in widths]
        assert not log
        assert other.returncode == 0

    assert len(journals(store)) == 1
    assert search(store, 8, 10).plans == {8: "own", 10: "cudnn"}


def test_of_two_searches_the_one_that_ended_is_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "journals"
    journal = Journal(folder)
    first, second = journal.begin({"search": 1}), journal.begin({"search": 2})
    journal.end(first)
    (path,) = folder.iterdir()
    (folder / "dead.journal").write_bytes(path.read_bytes())

    (remnant,) = Journal(folder).unfinished_work()

    assert remnant.fields == {"search": 2}
    journal.end(second)
    assert not path.read_bytes()
    journal.close()
    assert [left.name for left in folder.iterdir()] == ["dead.journal"]


def test_a_journal_that_tells_of_nothing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.journal").touch()
    (tmp_path / "b.journal").write_text('\n{"begin": 0, "thre\n[]\n{"begin": "x"}\n\x00\n')
    assert not Journal(tmp_path).unfinished_work()
    assert not list(tmp_path.iterdir())


def test_what_is_known_is_not_noted(store: Path) -> None:
    search(store, 8)
    store.joinpath("journals").rmdir()
    store.joinpath("journals").write_text("in the way")

    known = search(store, 8)

    assert known.plans == {8: "cudnn"}
    assert not known.log


def test_a_store_that_cannot_be_written_costs_the_notes_and_one_warning(store: Path) -> None:
    store.mkdir()
    store.joinpath("journals").write_text("in the way")

    found = search(store, 8, 9)

    assert found.plans == {8: "cudnn", 9: "cudnn"}
    assert found.exit_code == 0
    assert found.log.count("cannot be noted") == 1


def test_a_full_disk_costs_the_notes_and_one_warning(store: Path) -> None:
    found = search(store, 8, 9, prefix=("sh", "-c", 'ulimit -f 0 && exec "$@"', "sh"))

    assert found.plans == {8: "cudnn", 9: "cudnn"}
    assert found.exit_code == 0
    assert found.log.count("cannot be noted") == 1


def test_a_client_that_looks_for_crashes_ends_no_more_than_some_servers(store: Path) -> None:
    search(store, 100)
    search(store, 8, deaths={"cudnn 8": "SIGFPE"})
    (journal,) = journals(store)
    text = journal.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith('{"begin"'))
    for number in range(14):
        note = json.loads(line)
        note["fields"]["search"]["x"][-1] = 20 + number
        copy = text.replace(line, json.dumps(note))
        journal.with_name(f"{number}.journal").write_text(copy)
    assert search(store, 50).plans == {50: "cudnn"}

    search(store, 9, deaths={"cudnn 9": "SIGFPE"})
    last = search(store, 50, 51, 52, 100)

    assert last.plans == {50: "cudnn", 51: "own", 52: "own", 100: "cudnn"}
    assert last.log.count("all new problems without cuDNN") == 1
