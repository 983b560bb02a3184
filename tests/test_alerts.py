"""The files for Prometheus and Grafana are sound, each alert fires when it should, and has a section of the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.monitoring.configuration import RULES
from benchmarks.monitoring.grafana import DASHBOARD, Target, read_panels
from tests.environments import ROOT

RULES_TEST = ROOT / "tests" / "data" / "prometheus-rules-test.yaml"
METRICS = ROOT / "docs" / "metrics.md"
RUNBOOK = ROOT / "docs" / "runbook.md"

ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool, of Debian's package prometheus"
)


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", "--lint-fatal", RULES)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@needs_promtool
def test_promtool_accepts_the_sample_configuration(tmp_path: Path) -> None:
    for name in ("prometheus.yaml", RULES.name):
        text = (ROOT / "deploy" / name).read_text()
        (tmp_path / name).write_text(text.replace("/etc/prometheus/", f"{tmp_path}/"))
    for name in ("deconvd.token", "deconvd-ca.pem"):
        (tmp_path / name).touch()

    done = promtool("check", "config", tmp_path / "prometheus.yaml")

    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    done = promtool("test", "rules", RULES_TEST)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tried_firing_and_not_firing(alert: str) -> None:
    tried = RULES_TEST.read_text()

    assert f"{{alertname: {alert}, eval_time" in tried
    assert re.search(
        rf"- alertname: {alert}\n +eval_time: .*\n +exp_alerts:\n +- exp_labels", tried
    )


def without_time(rule: str) -> str:
    """Return a rule that fires at once."""
    return re.sub(r"for: \d+m", "for: 0s", rule)


def with_limit(rule: str, factor: float) -> str:
    """Return a rule with another limit."""
    return re.sub(r" > ([\d.]+)\n", lambda found: f" > {factor * float(found[1])}\n", rule)


def with_opposite(rule: str) -> str:
    """Return a rule that fires if all is well."""
    return rule.replace(" == 0\n", " == 1\n")


@needs_promtool
@pytest.mark.parametrize(
    "mutate",
    [without_time, partial(with_limit, factor=3), partial(with_limit, factor=1 / 3), with_opposite],
    ids=["time", "high", "low", "opposite"],
)
def test_the_tests_of_the_rules_notice_wrong_limits_and_times(
    tmp_path: Path, mutate: Callable[[str], str]
) -> None:
    head, *rules = re.split(r"(?=      - alert: )", RULES.read_text())
    mutants = [mutate(rule) for rule in rules]
    (tmp_path / "rules.yaml").write_text("".join([head, *mutants]))
    tried = RULES_TEST.read_text().replace("../../deploy/prometheus-rules.yaml", "rules.yaml")
    (tmp_path / "test.yaml").write_text(tried)

    done = promtool("test", "rules", tmp_path / "test.yaml")

    changed = {
        alert for alert, rule, mutant in zip(ALERTS, rules, mutants, strict=True) if rule != mutant
    }
    noticed = set(re.findall(r"alertname: (\w+),", done.stdout + done.stderr))
    assert changed
    assert noticed == changed


def test_each_alert_has_a_section_of_the_runbook_and_says_where_it_is() -> None:
    sections = re.findall(r"^## (Deconvd\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    anchors = re.findall(r"runbook: docs/runbook\.md#(\S+)", RULES.read_text())

    assert sections == ALERTS
    assert anchors == [alert.lower() for alert in ALERTS]


def test_each_link_inside_the_runbook_leads_to_a_section() -> None:
    text = RUNBOOK.read_text()
    anchors = [
        name.lower().replace(" ", "-")
        for name in re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    ]

    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= set(anchors)
    for path in re.findall(r"\]\(([^#)]+)", text):
        assert (RUNBOOK.parent / path).exists(), path


def test_the_runbook_names_panels_that_there_are() -> None:
    named = set(re.findall(r"\*\*(.+?)\*\*", RUNBOOK.read_text()))

    assert len(named) > 10
    assert named <= {panel.title for panel in read_panels()} | {
        panel.row for panel in read_panels()
    }


def test_the_picture_of_the_runbook_is_small_and_shows_panels_that_there_are() -> None:
    picture = ROOT / "docs" / "dashboard.svg"
    shown = set(re.findall(r">([^<>]+)</text>", picture.read_text()))

    assert picture.stat().st_size < 200_000
    assert len(shown & {panel.title for panel in read_panels()}) == 8


def test_each_alert_is_critical_or_a_warning() -> None:
    severities = re.findall(r"severity: (\w+)", RULES.read_text())

    assert len(severities) == len(ALERTS)
    assert set(severities) == {"critical", "warning"}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {each["name"]: each["type"] for each in dashboard["templating"]["list"]}
    ids = [panel["id"] for panel in dashboard["panels"]]

    assert "id" not in dashboard
    assert variables == {"datasource": "datasource", "instance": "query"}
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]


def test_the_panels_are_beside_each_other() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]

    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        ), (one, other)


def test_each_expression_of_the_dashboard_is_about_the_chosen_servers() -> None:
    for panel in read_panels():
        for target in panel.targets:
            selectors = re.findall(r"\w+_\w+\{([^}]*)\}", target.expression)
            assert selectors
            assert all('instance=~"$instance"' in each for each in selectors), panel


def test_all_documented_metrics_are_shown_and_no_others() -> None:
    documented = set(re.findall(r"^\| `(deconvd_\w+)`", METRICS.read_text(), flags=re.MULTILINE))
    queries = [RULES.read_text(), *(t.expression for p in read_panels() for t in p.targets)]
    used = set(re.findall(r"\bdeconvd_\w+", " ".join(queries)))

    assert documented
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} == documented - {
        "deconvd_device_info"
    }


def test_a_variable_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown variable"):
        Target('up{job="$job"}', "").with_values(1)
