"""A candidate: one of the plans from which the tuner chooses. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.choice import Choice

__all__ = ["Candidate"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that could be chosen.

    Attributes:
        plan: Takes the request as it is, whatever its element types and sizes.
        choice: How to make the plan again.
        close: Frees the plan. Nobody may be executing it.
        always_runs: Whether it is the fallback, which is not tried out: there is nothing to take instead.
    """

    plan: Plan
    choice: Choice
    close: Callable[[], None] = lambda: None
    always_runs: bool = False
