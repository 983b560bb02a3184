"""The soak tells what must not be from what may be while the server is away."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.soak.health import Check
from tests.soak.honest import Failure, Outcome
from tests.soak.places import Interval
from tests.soak.report import Results
from tests.soak.supervisor import Drain, Record

AWAY = (100.0, 104.0)
BOUND_BYTES = 1 << 30


def outcome(*failures: Failure, way: str = "stock", slowest: Interval = (0.0, 0.1)) -> Outcome:
    return Outcome(way, slowest, failures=list(failures), answered=[(0.0, 0.1)])


def failure(begin_s: float, end_s: float, *, was_told: bool = True) -> Failure:
    when = begin_s, end_s
    return Failure(when, "UnavailableError", "full", is_last=True, was_told=was_told)


def violations(*outcomes: Outcome, check: Check | None = None, memory_bytes: int = 0) -> str:
    drains = [Drain((100.0, 102.0), 0, is_cut=False)]
    results = Results(
        outcomes=outcomes,
        checks=[check] if check else [],
        record=Record(BOUND_BYTES, absences=[AWAY], drains=drains, memory_bytes=memory_bytes),
        failed_clients=(),
        attacks_count=Counter(),
        logs=(),
    )
    assert results.to_text()
    return "; ".join(results.violations())


@pytest.mark.parametrize(
    ("begin_s", "end_s", "is_violation"),
    [(50.0, 51.0, True), (99.0, 101.0, False), (103.0, 104.5, False), (80.0, 101.0, True)],
)
def test_an_error_counts_unless_the_server_was_away(
    begin_s: float, end_s: float, is_violation: bool
) -> None:
    told = violations(outcome(failure(begin_s, end_s)))

    assert ("an error, 1 times: UnavailableError: full" in told) == is_violation


@pytest.mark.parametrize(
    ("begin_s", "was_told", "is_lost"),
    [(99.0, False, True), (99.0, True, False), (99.9, False, False)],
)
def test_a_call_under_way_at_a_signal_must_be_told_of(
    begin_s: float, was_told: bool, is_lost: bool
) -> None:
    told = violations(outcome(failure(begin_s, 101.0, was_told=was_told)))

    assert ("neither answered nor told" in told) == is_lost


@pytest.mark.parametrize(("end_s", "is_late"), [(22.5, False), (23.5, True)])
def test_health_must_be_answered_soon(end_s: float, is_late: bool) -> None:
    told = violations(check=Check((20.0, end_s), "SERVING", is_new=False))

    assert ("health was late" in told) == is_late


def test_what_is_wrong_or_slow_or_too_large_is_told() -> None:
    wrong = outcome(slowest=(10.0, 30.0))
    wrong.wrong.append("1 is not 2")

    told = violations(wrong, memory_bytes=BOUND_BYTES + (1 << 20))

    assert "a wrong result, 1 times: 1 is not 2" in told
    assert "a call took 20.0 s" in told
    assert "memory: 1025 MiB in the process, of 1024" in told


def test_nothing_is_told_of_what_is_as_it_must_be() -> None:
    assert violations(outcome(), check=Check((1.0, 1.1), "SERVING", is_new=True)) == ""
