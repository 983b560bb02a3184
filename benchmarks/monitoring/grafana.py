"""What a Grafana dashboard shows: its panels, and their expressions as Prometheus takes them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["DASHBOARD", "Panel", "Target", "read_panels"]

DASHBOARD: Final = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"

_VARIABLE: Final = re.compile(r"\$\{?\w+")


@dataclass(frozen=True, slots=True)
class Target:
    """A query of a panel.

    Attributes:
        expression: As it stands in the dashboard, with variables.
        legend: How its series are called: a text with labels as ``{{stage}}``.
    """

    expression: str
    legend: str

    def with_values(self, range_s: float) -> str:
        """Return the expression for all servers. Raises ValueError if it has a variable that is not known here.

        Args:
            range_s: What Grafana would put for ``$__rate_interval`` and in place of all other ranges.
        """
        text = self.expression.replace("$__rate_interval", "0m").replace("$instance", ".*")
        if _VARIABLE.search(text):
            raise ValueError(f"the dashboard has an unknown variable: {self.expression}")
        return re.sub(r"\[\d+[smh]\]", f"[{range_s * 1000:.0f}ms]", text)


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of a dashboard that shows queries.

    Attributes:
        row: The title of the row that it is in.
        kind: ``timeseries``, ``stat`` or ``heatmap``.
        unit: Grafana's name of the unit.
        is_stacked: Whether its series are drawn one upon the other.
    """

    title: str
    row: str
    kind: str
    unit: str
    is_stacked: bool
    targets: tuple[Target, ...]


def read_panels(path: Path = DASHBOARD) -> list[Panel]:
    """Return the panels of a dashboard, in order."""
    panels: list[Panel] = []
    row = ""
    for each in json.loads(path.read_text())["panels"]:
        if each["type"] == "row":
            row = each["title"]
        else:
            panels.append(_panel_from_json(each, row))
    return panels


def _panel_from_json(panel: dict[str, Any], row: str) -> Panel:
    defaults = panel["fieldConfig"]["defaults"]
    stacking = defaults.get("custom", {}).get("stacking", {})
    return Panel(
        panel["title"],
        row,
        panel["type"],
        defaults["unit"],
        stacking.get("mode") == "normal",
        tuple(Target(each["expr"], each["legendFormat"]) for each in panel["targets"]),
    )
