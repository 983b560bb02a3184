"""Trials: always while they pay, and ever more seldom while they do not."""

from __future__ import annotations

from deconvd.host.adaptive_backoff import AdaptiveBackoff


def pause_count(trials: AdaptiveBackoff) -> int:
    """Return how many occasions pass until a trial is due."""
    return next(count for count in range(1000) if trials.is_due())


def test_what_pays_is_tried_each_time_and_what_does_not_after_longer_and_longer() -> None:
    trials = AdaptiveBackoff()
    pauses = [pause_count(trials)]
    for has_paid in (True, False, False, False, True, False, True, True):
        trials.record_outcome(has_paid=has_paid)
        pauses.append(pause_count(trials))

    assert pauses == [0, 0, 1, 3, 7, 0, 1, 0, 0]


def test_pauses_grow_up_to_sixty_four_occasions() -> None:
    trials, pauses = AdaptiveBackoff(), []
    for _ in range(9):
        trials.record_outcome(has_paid=False)
        pauses.append(pause_count(trials))

    assert pauses == [1, 3, 7, 15, 31, 63, 64, 64, 64]


def test_what_never_pays_is_tried_now_and_then() -> None:
    trials, tried_count = AdaptiveBackoff(), 0
    for _ in range(10_000):
        if trials.is_due():
            tried_count += 1
            trials.record_outcome(has_paid=False)

    assert 10_000 / 65 < tried_count < 10_000 / 65 + 10
