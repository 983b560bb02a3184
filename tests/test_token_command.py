"""`deconvd-server token new`: it prints a token once, and what is left of it is a hash."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from deconvd_server.__main__ import main
from deconvd_server.access.tokens import TokenFile, parse_tokens

DAY_S = 24 * 60 * 60


def token_new(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run the command as its users do; return its exit code, its output and its errors."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "deconvd_server", "token", "new", *arguments],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_a_new_token_is_printed_and_its_hash_is_kept_for_its_owner_alone(path: Path) -> None:
    code, printed, said = token_new("alice", "--tokens", str(path))

    assert (code, said) == (0, "")
    secret = printed.removesuffix("\n")
    assert TokenFile(path).name_of(secret) == "alice"
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["tokens"]


def test_the_file_may_come_from_the_environment_that_the_server_has(path: Path) -> None:
    environment = {"DECONVD_TOKENS": str(path), "DECONVD_LISTEN": "0.0.0.0:50051"}

    code, printed, _ = token_new("alice", environment=environment)

    assert code == 0
    assert TokenFile(path).name_of(printed.strip()) == "alice"


def test_a_second_token_of_a_name_is_valid_beside_the_first(path: Path) -> None:
    _, first, _ = token_new("alice", "--tokens", str(path))
    code, second, said = token_new("alice", "--tokens", str(path))

    assert code == 0
    assert said == "alice has 2 tokens now: to revoke one, remove its line\n"
    tokens = TokenFile(path)
    assert tokens.name_of(first.strip()) == tokens.name_of(second.strip()) == "alice"


def invoke(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and all that it says."""
    outcome = CliRunner().invoke(main, ["token", "new", *arguments])
    return outcome.exit_code, outcome.output


def test_days_limit_how_long_it_is_valid(path: Path) -> None:
    invoke("alice", "--tokens", str(path), "--days", "30")

    (token,) = parse_tokens(path.read_bytes())
    assert token.not_after_s == pytest.approx(time.time() + 30 * DAY_S, abs=60)


def test_what_the_file_says_already_stays_and_so_do_its_permissions(path: Path) -> None:
    path.write_text("# ours")  # without an end of its line
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to("tokens")

    code, _ = invoke("bob", "--tokens", str(link))

    assert code == 0
    assert link.is_symlink()
    first, second = path.read_text().splitlines()
    assert first == "# ours"
    assert second.startswith("bob sha256:")
    assert path.stat().st_mode & 0o777 == 0o640


def test_tokens_that_are_made_at_once_are_all_kept(path: Path) -> None:
    names = [f"user-{number}" for number in range(6)]
    with ThreadPoolExecutor(3) as pool:
        ended = pool.map(lambda name: token_new(name, "--tokens", str(path)), names)

    tokens = TokenFile(path)
    assert sorted(tokens.name_of(printed.strip()) or "" for _, printed, _ in ended) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b", "--tokens", "tokens"], "Invalid value for 'NAME': 'a b' is not 1 to 64 of"),
        (["x" * 65, "--tokens", "tokens"], "is not 1 to 64 of"),
        (["alice"], "Missing option '--tokens'"),
        (["alice", "--tokens", "tokens", "--days", "0"], "0 is not in the range"),
        (["alice", "--tokens", "absent/tokens"], "cannot write absent/tokens: No such file"),
        (["alice", "--tokens", "broken"], "broken: line 1 must have the form NAME sha256:HEX"),
        (["alice", "--tokens", "."], "is a directory"),
        (["alice", "--tokens", "loop"], "cannot write loop: Too many levels of symbolic links"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").write_text("not-tokens")
    (tmp_path / "loop").symlink_to("loop")

    code, said = invoke(*arguments)

    assert code in (1, 2)
    assert message in said
    assert "dcd_" not in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "loop"]
    assert (tmp_path / "broken").read_text() == "not-tokens"


def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("# ours\n")

    def refuse(*_: object) -> None:
        raise OSError(16, "Device or resource busy")  # as for a file that is a mount of its own

    monkeypatch.setattr("deconvd_server.token_command.os.replace", refuse)
    code, said = invoke("alice", "--tokens", str(path))

    assert code == 1
    assert "cannot write" in said
    assert "Device or resource busy" in said
    assert path.read_text() == "# ours\n"
    assert [file.name for file in path.parent.iterdir()] == ["tokens"]
