"""Files with certificates, keys and tokens, as clients and servers read them at their start and when they change."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd_client.credential_options import parse_credentials
from deconvd_client.credentials import Credentials, Tls
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.access.tokens import TOKEN_NAME, TokenFile, TokenHash, parse_tokens
from tests.fuzz.case import Case, Seed
from tests.fuzz.frames import TOKEN
from tests.fuzz.target import Target

__all__ = ["CredentialFiles"]

_DATA: Final = Path(__file__).parents[1] / "data"
_LINE: Final = TokenHash.of("alice.example", TOKEN).as_line().encode()
_QUOTED_BYTES: Final = 12
"""An error that has so many bytes of a file, one after the other, quotes it."""


def _token_seeds() -> list[Seed]:
    dates = (b"2020-02-29 2999-12-30", b"- 2999-02-28T09:45:15Z", b"0001-01-01T00:00:00+05:00 -")
    tables = [_LINE, b"# nobody\n\n" + _LINE + b"  # a comment", *(_LINE + b" " + d for d in dates)]
    other = TokenHash.of("b", TOKEN.swapcase()).as_line().encode()
    tables.append(b"\r\n".join([_LINE, other]))
    return [
        *(Seed("tokens", [table + b"\n"], is_list=False) for table in tables),
        *(Seed("token", [TOKEN.encode() + end], is_list=False) for end in (b"", b"\n", b" \r\n")),
    ]


def _seeds() -> list[Seed]:
    cert, key, encrypted_key, ca = (
        (_DATA / f"fuzzed-{name}.pem").read_bytes()
        for name in ("cert", "key", "encrypted-key", "ca")
    )
    return [
        Seed(kind, files, is_list=False)
        for kind in ("client", "server")
        for files in ([cert, key, ca], [cert + ca, key, ca], [cert, encrypted_key, ca])
    ]


class CredentialFiles(Target):
    """A certificate, its key and an authority, each in a file; tokens, and one token.

    They are read, or refused, and never asked about. No error quotes a file of tokens.
    """

    seeds = (*_seeds(), *_token_seeds())
    bounded_count = 250
    share = 1

    def open(self, stack: ExitStack) -> None:
        names = ("cert", "key", "ca")
        self._tokens = self.directory / "tokens"
        self._tokens.touch(0o600)
        self._cert, self._key, self._ca = (self.directory / f"{name}.pem" for name in names)
        for seed in self.seeds[:2]:  # those of a certificate without a passphrase are good
            self._write(seed.to_case())
            assert Credentials(tls=self._tls).tls_state is not None

    @property
    def _tls(self) -> Tls:
        return Tls(self._ca, self._cert, self._key)

    def _write(self, case: Case) -> None:
        for path, data in zip((self._cert, self._key, self._ca), case.parts, strict=True):
            path.write_bytes(data)

    def feed(self, case: Case) -> None:
        if case.kind == "tokens":
            self._read_tokens(case.parts[0])
        elif case.kind == "token":
            self._read_token(case.parts[0])
        else:
            self._read_certificates(case)

    def _read_certificates(self, case: Case) -> None:
        self._write(case)
        if case.kind == "client":
            with suppress(InvalidArgumentError):
                credentials = Credentials(tls=self._tls)
                assert "PRIVATE" not in repr(credentials)
        else:
            with suppress(OSError, ValueError):
                ServerTls(self._cert, self._key, self._ca).current()

    def _read_tokens(self, data: bytes) -> None:
        """Read a server's file of tokens, and see that it means what it says."""
        self._tokens.write_bytes(data)
        try:
            tokens = TokenFile(self._tokens)
        except ValueError as error:
            _check_unquoted(error, data)
            return
        parsed = parse_tokens(data)
        for token in parsed:
            assert TOKEN_NAME.fullmatch(token.name)
            assert token.not_before_s < token.not_after_s
            assert parse_tokens(token.as_line().encode()) == [_in_whole_seconds(token)]
        mine = [token.name for token in parsed if token.digest == _DIGEST]
        assert tokens.name_of(TOKEN) in (*mine, None)
        assert tokens.name_of(TOKEN + "x") is None

    def _read_token(self, data: bytes) -> None:
        """Read a client's file with its token, and see that what is sent is in it, and can be sent."""
        self._tokens.write_bytes(data)
        try:
            credentials = parse_credentials("127.0.0.1:1", False, self._tokens)
        except InvalidArgumentError as error:
            _check_unquoted(error, data)
            return
        token = credentials.token()
        assert token.encode() == data.strip(b" \t\r\n")
        assert all("!" <= letter <= "~" for letter in token)
        assert credentials.metadata() == (("authorization", f"Bearer {token}"),)
        assert len(token) < _QUOTED_BYTES or token not in repr(credentials)


_DIGEST: Final = TokenHash.of("", TOKEN).digest


def _in_whole_seconds(token: TokenHash) -> TokenHash:
    """Return a token as a line of a file has it."""
    return token._replace(
        not_before_s=_whole(token.not_before_s), not_after_s=_whole(token.not_after_s)
    )


def _whole(time_s: float) -> float:
    return time_s if math.isinf(time_s) else math.floor(time_s)


def _check_unquoted(error: Exception, data: bytes) -> None:
    """See that an error has no piece of a file."""
    text, secret = str(error), data.decode("latin-1")
    for begin in range(len(secret) - _QUOTED_BYTES + 1):
        piece = secret[begin : begin + _QUOTED_BYTES]
        assert piece not in text, f"{text!r} quotes {piece!r}"
