"""What a supervisor gives a worker when it starts it: its name, its channels, and its own values for some options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["WorkerOrders"]

_VARIABLE: Final = "_DECONVD_WORKER"
"""The environment variable that has the orders."""

_PATHS: Final = frozenset({"plan_store"})
_LISTS: Final = frozenset({"addresses", "metrics_readers"})


@dataclass(frozen=True, slots=True)
class WorkerOrders:
    """The orders of a worker.

    Attributes:
        name: Its name, which is its number.
        link: The descriptor of its link to the supervisor.
        metrics: The descriptor by which the supervisor asks for metrics; None if nobody does.
        quotas: The descriptor of the memory in which all workers count what tenants use; None if there are no quotas.
        card_parts_count: How many workers share the memory of its card.
        is_plan_store_lasting: Whether the folder of plans outlives the supervisor.
        watchdog_s: How long its main thread may be silent.
        options: Values for options of the command, by the names of the parameters, in place of those that were given.
    """

    name: str
    link: int
    metrics: int | None
    quotas: int | None
    card_parts_count: int
    is_plan_store_lasting: bool
    watchdog_s: float
    options: Mapping[str, Any]

    @classmethod
    def take(cls) -> WorkerOrders | None:
        """Return the orders of this process, which its own children do not get; None if it is no worker."""
        text = os.environ.pop(_VARIABLE, "")
        if not text:
            return None
        orders = cls(**json.loads(text))
        options = {name: _from_json(name, value) for name, value in orders.options.items()}
        return cls(**{**asdict(orders), "options": options})

    def to_environment(self) -> dict[str, str]:
        """Return the variables that a process must have to get these orders."""
        return {_VARIABLE: json.dumps(asdict(self), default=str)}


def _from_json(name: str, value: Any) -> Any:
    if value is not None and name in _PATHS:
        return Path(value)
    return tuple(value) if name in _LISTS else value
