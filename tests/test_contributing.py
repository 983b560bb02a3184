"""What CONTRIBUTING.md names exists, so that who follows it does not look in vain."""

from __future__ import annotations

import re

import pytest

from tests.environments import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

PATHS = sorted(set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:md|toml))`", CONTRIBUTING)))
TARGETS = sorted(set(re.findall(r"(?:^    |`)make ([\w-]+)", CONTRIBUTING, re.MULTILINE)))


def test_it_says_where_changes_go() -> None:
    assert len(PATHS) > 30
    assert {"check", "check-all", "format", "generate", "mutate"} <= set(TARGETS)


@pytest.mark.parametrize("path", PATHS)
def test_its_paths_exist(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


@pytest.mark.parametrize("target", TARGETS)
def test_its_commands_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
