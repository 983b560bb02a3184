"""How the checks are run: which tests belong to which, and what a skipped one means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
