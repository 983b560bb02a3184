"""Trials: always while they pay, and ever more seldom while they do not."""

from __future__ import annotations

from deconvd.trials import Trials


def pause_count(trials: Trials) -> int:
    """Return how many occasions pass until a trial is due."""
    return next(count for count in range(1000) if trials.is_due())


def test_what_pays_is_tried_each_time_and_what_does_not_after_longer_and_longer() -> None:
    trials = Trials()
    pauses = [pause_count(trials)]
    for has_paid in (True, False, False, False, True, False, True, True):
        trials.note(has_paid=has_paid)
        pauses.append(pause_count(trials))

    assert pauses == [0, 0, 1, 3, 7, 0, 1, 0, 0]


def test_pauses_grow_up_to_sixty_four_occasions() -> None:
    trials, pauses = Trials(), []
    for _ in range(9):
        trials.note(has_paid=False)
        pauses.append(pause_count(trials))

    assert pauses == [1, 3, 7, 15, 31, 63, 64, 64, 64]


def test_what_never_pays_is_tried_now_and_then() -> None:
    trials, tried_count = Trials(), 0
    for _ in range(10_000):
        if trials.is_due():
            tried_count += 1
            trials.note(has_paid=False)

    assert 10_000 / 65 < tried_count < 10_000 / 65 + 10
