"""Who a caller is: by its token, its certificate, or where it calls from, in this order."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from deconvd.errors import UnauthenticatedError
from deconvd_server.access.authenticator import Authenticator, Caller
from deconvd_server.access.caller_pass import shown_certificate
from deconvd_server.access.caller_proof import CallerProof


class Tokens:
    """A table with one token, of alice."""

    def name_of(self, token: str) -> str | None:
        """Return whose token it is."""
        return "alice" if token == "secret" else None


OPEN = Authenticator()
TOKENS = Authenticator(Tokens())
CERTIFICATES = Authenticator(takes_certificates=True)
BOTH = Authenticator(Tokens(), takes_certificates=True)


def identify(
    authenticator: Authenticator, token: str = "", name: str = "", *, is_local: bool = False
) -> Caller:
    return authenticator.identify("10.0.0.1", token=token, certificate_name=name, is_local=is_local)


@pytest.mark.parametrize(
    ("authenticator", "token", "name", "is_local", "identity"),
    [
        (OPEN, "", "", False, ""),
        (OPEN, "", "", True, ""),
        (OPEN, "secret", "", False, ""),  # the server knows no tokens
        (TOKENS, "secret", "", False, "alice"),
        (TOKENS, "secret", "", True, "alice"),
        (TOKENS, "", "", True, ""),
        (CERTIFICATES, "", "bob", False, "bob"),
        (CERTIFICATES, "secret", "bob", False, "bob"),
        (CERTIFICATES, "", "", True, ""),
        (BOTH, "secret", "bob", False, "alice"),
        (BOTH, "", "bob", False, "bob"),
        (BOTH, "", "", True, ""),
    ],
)
def test_a_caller_is_known_by_the_first_proof_that_it_shows(
    authenticator: Authenticator, token: str, name: str, is_local: bool, identity: str
) -> None:
    peer_key = f"tenant {identity}" if identity else "10.0.0.1"

    assert identify(authenticator, token, name, is_local=is_local) == (identity, peer_key)


@pytest.mark.parametrize(
    ("authenticator", "token", "name", "is_local", "advice"),
    [
        (TOKENS, "", "", False, "a token, or set DECONVD_TOKEN"),
        (BOTH, "", "", False, "a token, or set DECONVD_TOKEN"),
        (CERTIFICATES, "", "", False, r"a certificate, tls=Tls\(cert="),
        (CERTIFICATES, "secret", "", False, r"a certificate, tls=Tls\(cert="),
        (TOKENS, "wrong", "", False, "token must be one that this server knows"),
        (TOKENS, "wrong", "", True, "token must be one that this server knows"),
        (BOTH, "wrong", "bob", False, "token must be one that this server knows"),
    ],
)
def test_who_must_prove_something_and_does_not_is_told_what(
    authenticator: Authenticator, token: str, name: str, is_local: bool, advice: str
) -> None:
    with pytest.raises(UnauthenticatedError, match=advice) as raised:
        identify(authenticator, token, name, is_local=is_local)

    assert "wrong" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_it_says_whether_it_asks_for_anything() -> None:
    assert [each.is_open for each in (OPEN, TOKENS, CERTIFICATES, BOTH)] == [True] + [False] * 3
    assert [each.takes_tokens for each in (OPEN, TOKENS, CERTIFICATES, BOTH)] == [False, True] * 2


def test_a_certificate_proves_its_name_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = {
        "subject": ((("commonName", "alice"),),),
        "notAfter": "Jan  1 00:00:00 2031 GMT",
    }
    proof = CallerProof(
        Authenticator(takes_certificates=True),
        "10.0.0.1",
        token="",
        certificate=shown_certificate(certificate),
        is_local=False,
    )
    now_s = datetime(2031, 1, 1, tzinfo=UTC).timestamp()
    clock = SimpleNamespace(time=lambda: now_s)
    monkeypatch.setattr("deconvd_server.access.caller_proof.time", clock)

    assert proof.identify().identity == "alice"
    now_s += 1
    with pytest.raises(UnauthenticatedError):
        proof.identify()
