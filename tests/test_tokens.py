"""The file of tokens: what it may say, whose a token is and when, and that no error tells a secret."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deconvd_server.access.tokens import TokenFile, TokenHash, new_token, parse_tokens

SECRET = "dcd_correct-horse-battery-staple"
HEX = hashlib.sha256(SECRET.encode()).hexdigest()
HASH = f"sha256:{HEX}"
NOON_S = datetime(2030, 1, 31, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", f"alice {HASH}\n")


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the wall clock of the tokens."""

    def set_to(now_s: float) -> None:
        monkeypatch.setattr("deconvd_server.access.tokens.time.time", lambda: now_s)

    return set_to


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files looked at whenever they are asked for."""
    monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)


def write(path: Path, text: str) -> Path:
    staged = path.with_suffix(".new")
    staged.write_text(text)
    staged.chmod(0o600)
    os.replace(staged, path)
    return path


def test_a_token_is_long_random_and_fit_for_headers() -> None:
    assert re.fullmatch(r"dcd_[A-Za-z0-9_-]{43}", new_token())
    assert new_token() != new_token()


def test_a_token_is_its_names_and_no_other_is(path: Path) -> None:
    tokens = TokenFile(path)

    assert tokens.name_of(SECRET) == "alice"
    for other in ("", "dcd_", SECRET[:-1], SECRET + " ", HEX, HASH, "\udcff", "ä" * 1000):
        assert tokens.name_of(other) is None


def test_every_token_is_compared_in_constant_time_even_an_unknown_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("deconvd_server.access.tokens.hmac.compare_digest", compare)
    tokens = TokenFile(path)
    for token in (SECRET, "unknown"):
        tokens.name_of(token)

    assert [len(one) for one, _ in compared] == [32, 32]
    assert [other for _, other in compared] == [
        hashlib.sha256(token.encode()).digest() for token in (SECRET, "unknown")
    ]


def test_a_name_may_have_several_tokens(path: Path) -> None:
    second = new_token()
    write(path, f"alice {HASH}\n{TokenHash.of('alice', second).as_line()}\n")

    tokens = TokenFile(path)

    assert tokens.name_of(SECRET) == tokens.name_of(second) == "alice"


@pytest.mark.parametrize(
    ("dates", "before", "after"),
    [
        ("", True, True),
        ("- -", True, True),
        ("2030-01-31T12:00:00Z", False, True),
        ("2030-01-31T12:00:00 -", False, True),
        ("2030-01-31T13:00:00+01:00", False, True),
        ("- 2030-01-31T12:00:00Z", True, False),
        ("2030-01-31 2030-01-31T12:00:00Z", True, False),
        ("2030-02-01", False, False),
        ("- 2030-01-31", False, False),
    ],
)
def test_a_token_is_valid_from_its_first_date_until_its_second(
    path: Path, set_clock: Callable[[float], None], dates: str, before: bool, after: bool
) -> None:
    tokens = TokenFile(write(path, f"alice {HASH} {dates}"))

    set_clock(NOON_S - 0.001)
    assert (tokens.name_of(SECRET) is not None) == before
    set_clock(NOON_S)
    assert (tokens.name_of(SECRET) is not None) == after


@pytest.mark.parametrize(
    "text",
    [
        f"# whose?\n\n  \t\nalice {HASH} # my laptop\n",
        f"alice\t{HASH}\r\n",
        f"alice {HASH.replace(HEX, HEX.upper())}",
        f"# Grüße\nalice {HASH}",
    ],
)
def test_comments_blank_lines_and_ends_of_lines_do_not_matter(path: Path, text: str) -> None:
    assert TokenFile(write(path, text)).name_of(SECRET) == "alice"


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "x" * 64, "-", ".."])
def test_a_name_is_of_letters_digits_dots_and_dashes(path: Path, name: str) -> None:
    assert TokenFile(write(path, f"{name} {HASH}")).name_of(SECRET) == name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alice", "must have the form NAME sha256:HEX [not-before] [not-after], and has 1 words"),
        (f"alice {HASH} - - -", "must have the form .* and has 5 words"),
        (f"{'x' * 65} {HASH}", "must begin with a name of 1 to 64 letters"),
        (f"al/ice {HASH}", "must begin with a name of 1 to 64 letters"),
        (f"\u00e4 {HASH}", "must be ASCII, except in a comment"),
        (f"alice {HEX}", "must have a hash as its second word: sha256: and 64 hexadecimal digits"),
        (f"alice {SECRET}", "must have a hash as its second word"),
        (f"{SECRET}+ alice", "must begin with a name"),
        (f"alice {HASH}0", "must have a hash"),
        (f"alice sha512:{HEX}", "must have a hash"),
        (f"alice {HASH} {SECRET}", "must have a date as its third word, as in 2030-01-31 or"),
        (f"alice {HASH} - 2030-02-30", "must have a date as its fourth word"),
        (f"alice {HASH} 0001-01-01T00:00:00+05:00", "must have a date as its third word"),
        (f"alice {HASH} - 9999-12-31T23:00:00-05:00", "must have a date as its fourth word"),
        (f"alice {HASH} 2031-01-01 2030-01-01", "must have a not-after that is later"),
        (f"alice {HASH} 2030-01-01 2030-01-01", "must have a not-after that is later"),
        (
            f"bob {HASH.upper().replace('SHA', 'sha')}",
            "must have a token of its own, and line 1 has the same",
        ),
    ],
)
def test_a_wrong_line_is_named_by_its_file_and_number_and_nothing_of_it_is_quoted(
    path: Path, line: str, message: str
) -> None:
    write(path, f"alice {HASH}\n\n{line}\n")

    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as raised:
        TokenFile(path)

    text = str(raised.value)
    assert text.startswith(f"{path}: line 3 must ")
    assert SECRET not in text
    assert HEX not in text.lower()
    assert "x" * 65 not in text


def test_what_cannot_be_a_file_of_tokens_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TokenFile(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        TokenFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which nobody writes into
    with pytest.raises(ValueError, match="pipe: it must be a regular file"):
        TokenFile(tmp_path / "pipe")
    path.chmod(0o602)
    with pytest.raises(ValueError, match="every user may write to it"):
        TokenFile(path)
    with path.open("wb") as file:
        file.truncate((4 << 20) + 1)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="it must have at most 4194304 bytes"):
        TokenFile(path)
    path.write_bytes(b"#" * (4 << 20))
    assert TokenFile(path).name_of("") is None


def test_forty_thousand_tokens_fit(path: Path) -> None:
    lines = [TokenHash("n" * 16, number.to_bytes(32)).as_line() for number in range(40_000)]
    write(path, "\n".join([*lines, f"alice {HASH}"]))

    assert TokenFile(path).name_of(SECRET) == "alice"


def test_a_file_that_every_user_may_read_gets_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.chmod(0o640)
    TokenFile(path)
    assert not caplog.records
    path.chmod(0o644)
    assert TokenFile(path).name_of(SECRET) == "alice"

    (record,) = caplog.records
    assert f"every user may read the file of tokens {path}" in record.message


def test_a_line_is_what_is_parsed_from_it() -> None:
    for token in (
        TokenHash.of("alice", SECRET),
        TokenHash.of("alice", SECRET, NOON_S),
        TokenHash("bob", bytes(32), NOON_S, NOON_S + 1),
        TokenHash("bob", bytes(32), NOON_S),
        TokenHash("bob", bytes(32), datetime(1, 1, 1, tzinfo=UTC).timestamp(), NOON_S),
    ):
        assert parse_tokens(token.as_line().encode()) == [token]
    assert TokenHash.of("alice", SECRET).as_line() == f"alice {HASH}"
    assert TokenHash.of("alice", SECRET, NOON_S).as_line() == f"alice {HASH} - 2030-01-31T12:00:00Z"


@pytest.mark.usefixtures("at_once")
def test_a_change_counts_and_a_mistake_leaves_what_was_valid(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokens = TokenFile(path)
    write(path, f"alice {HASH}\nbob {SECRET}\n")
    assert tokens.name_of(SECRET) == "alice"
    write(path, f"bob {HASH}\n")
    assert tokens.name_of(SECRET) == "bob"
    write(path, "# nobody\n")
    assert tokens.name_of(SECRET) is None

    assert f"{path}: line 2 must have a hash" in caplog.text
    assert SECRET not in caplog.text
    assert HEX not in caplog.text


def test_no_text_of_the_tokens_tells_one(path: Path) -> None:
    tokens = TokenFile(path)

    assert repr(tokens) == f"TokenFile({str(path)!r})"
    assert SECRET not in str(vars(tokens))
