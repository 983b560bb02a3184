"""The options `tls` and `token` of `connect`, and the environment variables that stand for them."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

import deconvd_client
import deconvd_client.aio
from deconvd.errors import InvalidArgumentError
from deconvd_client import Connection, Tls
from deconvd_client.credential_options import parse_credentials
from deconvd_client.credentials import NO_CREDENTIALS, Credentials
from tests.certificates import Authority, CertificateFiles
from tests.servers import only_server

TOKEN = "dcd_" + "0123456789abcdef" * 2
FAR, NEAR = "gpu-host:50051", "127.0.0.1:50051"
VARIABLES = (
    *("DECONVD_TOKEN", "DECONVD_TOKEN_FILE"),
    *("DECONVD_TLS_CA", "DECONVD_CLIENT_CERT", "DECONVD_CLIENT_KEY"),
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def refused(argument: str, target: str = NEAR, **options: Any) -> str:
    """Return why `connect` refuses an argument."""
    with pytest.raises(InvalidArgumentError) as raised:
        deconvd_client.connect(target, **options)
    assert raised.value.argument == argument
    assert "\n" not in str(raised.value)
    return str(raised.value)


class TestToken:
    def test_nothing_is_sent_by_default(self) -> None:
        assert parse_credentials(FAR, None, None).metadata() is None
        assert NO_CREDENTIALS.metadata() is None

    def test_it_may_be_given(self) -> None:
        metadata = parse_credentials(NEAR, None, TOKEN).metadata()

        assert metadata == (("authorization", f"Bearer {TOKEN}"),)

    def test_it_may_be_in_a_file_whose_line_ends(self, token_file: Path) -> None:
        assert parse_credentials(NEAR, None, token_file).token() == TOKEN

    def test_a_file_is_read_again(
        self, token_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)
        credentials = parse_credentials(NEAR, None, token_file)
        (tmp_path / "new").write_text("another")
        os.replace(tmp_path / "new", token_file)

        assert credentials.metadata() == (("authorization", "Bearer another"),)

    def test_a_file_that_is_spoilt_leaves_the_token_as_it_was(
        self,
        token_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)
        credentials = parse_credentials(NEAR, None, token_file)
        token_file.write_text("half a\ntoken")

        assert credentials.token() == TOKEN
        assert f"{token_file} cannot be used" in caplog.text
        assert "half a" not in caplog.text
        assert TOKEN not in caplog.text

    def test_the_environment_is_asked_for_a_token_and_then_for_a_file(
        self, token_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DECONVD_TOKEN_FILE", str(token_file))
        assert parse_credentials(NEAR, None, None).token() == TOKEN
        monkeypatch.setenv("DECONVD_TOKEN", "one")
        assert parse_credentials(NEAR, None, None).token() == "one"
        assert parse_credentials(NEAR, None, "two").token() == "two"
        monkeypatch.setenv("DECONVD_TOKEN", "")
        assert parse_credentials(NEAR, None, None).token() == TOKEN

    @pytest.mark.parametrize(
        "token",
        ["", " ", "a b", f"{TOKEN}\n", "t\N{LATIN SMALL LETTER O WITH DIAERESIS}", "x" * 513],
    )
    def test_what_is_no_token_is_refused_and_not_shown(
        self, token: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = refused("token", token=token)
        assert text.startswith("token must have from 1 to 512 ASCII characters")
        assert f"got {len(token)} characters" in text
        if len(token) > 2:
            assert token not in text
        if token:
            monkeypatch.setenv("DECONVD_TOKEN", token)
            assert refused("token").startswith("DECONVD_TOKEN must have")

    @pytest.mark.parametrize("token", [b"bytes", 5, True, ["a"]])
    def test_another_type_is_refused(self, token: Any) -> None:
        assert "must be a str, or a pathlib.Path of a file" in refused("token", token=token)

    def test_a_file_that_cannot_be_read_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = tmp_path / "missing"
        assert str(missing) in refused("token", token=missing)
        assert "Is a directory" in refused("token", token=tmp_path)
        os.mkfifo(tmp_path / "pipe")  # which nobody writes into
        assert "pipe: it must be a regular file" in refused("token", token=tmp_path / "pipe")
        monkeypatch.setenv("DECONVD_TOKEN_FILE", str(missing))
        assert refused("token").startswith("DECONVD_TOKEN_FILE must be a file that can be read")

    def test_an_empty_file_is_refused(self, token_file: Path) -> None:
        token_file.write_text("\n")
        assert f"the file {token_file}" in refused("token", token=token_file)


class TestTokenWithoutTls:
    @pytest.mark.parametrize(
        "target",
        [
            *(FAR, "10.0.0.1:50051", "[2001:db8::1]:50051", "dns:gpu-host:50051"),
            "dns://10.0.0.53/localhost:50051",  # whatever that name server says
        ],
    )
    def test_it_travels_to_no_other_host(self, target: str, token_file: Path) -> None:
        assert "tls must be given to send a token to" in refused("tls", target, token=TOKEN)
        refused("tls", target, token=token_file)
        refused("tls", target, token=TOKEN, tls=None)

    @pytest.mark.parametrize(
        "target", [NEAR, "localhost:50051", "[::1]:50051", "unix:/run/deconvd.sock"]
    )
    def test_it_may_travel_on_this_host(self, target: str) -> None:
        deconvd_client.connect(target, token=TOKEN).close()

    def test_it_may_travel_where_the_caller_trusts_the_network(
        self, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deconvd_client.connect(FAR, token=TOKEN, tls=False).close()
        deconvd_client.connect(FAR, token=TOKEN, tls=True).close()
        monkeypatch.setenv("DECONVD_TLS_CA", str(authority.ca))
        deconvd_client.connect(FAR, token=TOKEN).close()


class TestTls:
    def test_there_is_none_by_default(self) -> None:
        assert parse_credentials(FAR, None, None).tls is None
        assert parse_credentials(FAR, False, None).tls is None

    def test_the_environment_may_ask_for_it(
        self,
        authority: Authority,
        loopback_certificate: CertificateFiles,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        cert, key = map(str, (loopback_certificate.cert, loopback_certificate.key))
        monkeypatch.setenv("DECONVD_TLS_CA", str(authority.ca))
        assert parse_credentials(FAR, None, None).tls == Tls(ca=str(authority.ca))
        monkeypatch.setenv("DECONVD_CLIENT_CERT", cert)
        monkeypatch.setenv("DECONVD_CLIENT_KEY", key)
        assert parse_credentials(FAR, None, None).tls == Tls(str(authority.ca), cert, key)
        assert parse_credentials(FAR, True, None).tls == Tls()
        assert parse_credentials(FAR, False, None).tls is None
        assert parse_credentials("unix:/s", None, None).tls is None

    @pytest.mark.parametrize(
        ("variable", "why"),
        [
            ("DECONVD_TLS_CA", "No such file"),
            ("DECONVD_CLIENT_CERT", "got cert without key"),
            ("DECONVD_CLIENT_KEY", "got key without cert"),
        ],
    )
    def test_what_is_wrong_in_the_environment_is_named(
        self, variable: str, why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "/nonexistent/file.pem")

        text = refused("tls", FAR)

        assert text.startswith(f"{variable}: ")
        assert why in text

    @pytest.mark.parametrize("tls", ["yes", 1, {"ca": "x"}, Path("ca.pem")])
    def test_another_type_is_refused(self, tls: Any) -> None:
        assert "tls must be True, False, None or a deconvd_client.Tls" in refused("tls", tls=tls)

    @pytest.mark.parametrize(
        "attributes",
        [
            *({"ca": 5}, {"ca": ""}, {"ca": b"ca.pem"}, {"cert": 5, "key": "k"}, {"cert": "c"}),
            *({"key": "k"}, {"server_name": ""}, {"server_name": 5}),
        ],
    )
    def test_its_attributes_are_checked(self, attributes: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^tls must have") as raised:
            Tls(**attributes)
        assert raised.value.argument == "tls"

    def test_files_that_cannot_be_used_are_refused(
        self, authority: Authority, loopback_certificate: CertificateFiles, tmp_path: Path
    ) -> None:
        files = loopback_certificate
        other = authority.issue("other.example")
        locked = tmp_path / "locked.pem"
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        locked.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"a passphrase"),
            )
        )
        (tmp_path / "text").write_text("no certificate")

        def why(tls: Tls) -> str:
            return refused("tls", tls=tls)

        assert "No such file" in why(Tls(ca=tmp_path / "missing"))
        assert "has no certificates in PEM" in why(Tls(ca=tmp_path / "text"))
        assert "is not the key of" in why(Tls(cert=files.cert, key=other.key))
        assert "without a passphrase" in why(Tls(cert=files.cert, key=locked))
        assert "without a passphrase" in why(Tls(cert=tmp_path / "text", key=files.key))

    def test_what_it_means_stays_the_same_object_until_files_change(
        self, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)
        ca = tmp_path / "ca.pem"
        ca.write_bytes(authority.ca.read_bytes())
        credentials = Credentials(tls=Tls(ca=ca))
        state = credentials.tls_state
        assert credentials.tls_state is state
        ca.write_bytes(authority.ca.read_bytes() * 2)

        assert credentials.tls_state is not state
        assert credentials.fresh_tls_state() is credentials.tls_state

    def test_a_unix_socket_has_the_token_alone(self, authority: Authority) -> None:
        credentials = Credentials(lambda: TOKEN, Tls(ca=authority.ca)).without_tls()

        assert credentials.tls_state is None
        assert credentials.token() == TOKEN


class TestSecrets:
    @pytest.fixture(params=["given", "environment"])
    def secretive(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Connection:
        if request.param == "given":
            return deconvd_client.connect(NEAR, token=TOKEN)
        monkeypatch.setenv("DECONVD_TOKEN", TOKEN)
        return deconvd_client.connect(NEAR)

    def test_a_token_is_in_no_pickle_and_no_text(self, secretive: Connection) -> None:
        with secretive as F:
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                assert TOKEN.encode() not in pickle.dumps(F, protocol)
            credentials = parse_credentials(NEAR, None, TOKEN)
            assert TOKEN not in f"{F!r}{F}{credentials!r}{credentials}{vars(F)!r}"

    def test_a_key_is_in_no_text(
        self, authority: Authority, loopback_certificate: CertificateFiles
    ) -> None:
        files = loopback_certificate
        state = Credentials(tls=Tls(authority.ca, files.cert, files.key)).tls_state

        assert "PRIVATE KEY" not in repr(state)

    @pytest.mark.parametrize(
        "duplicate", [lambda F: pickle.loads(pickle.dumps(F)), copy.copy, copy.deepcopy]
    )
    def test_paths_travel_with_copies(
        self, duplicate: Callable[[Connection], Connection], token_file: Path, authority: Authority
    ) -> None:
        tls = Tls(ca=authority.ca, server_name="inner.example")
        with (
            deconvd_client.connect(FAR, token=token_file, tls=tls) as F,
            duplicate(F) as again,
        ):
            assert credentials_of(again).token() == TOKEN
            assert credentials_of(again).tls == tls

    def test_a_copy_takes_the_token_of_where_it_is_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with deconvd_client.connect(FAR, token=TOKEN, tls=False) as F:
            data = pickle.dumps(F)
        with pickle.loads(data) as without:
            assert credentials_of(without).token() == ""
        monkeypatch.setenv("DECONVD_TOKEN", "that-of-this-place")
        with pickle.loads(data) as again:
            assert credentials_of(again).token() == "that-of-this-place"

    def test_asyncio_has_the_same_options(self, token_file: Path) -> None:
        F = deconvd_client.aio.connect(NEAR, token=token_file, tls=False)

        assert pickle.loads(pickle.dumps(F)).target == NEAR


def credentials_of(F: Connection) -> Credentials:
    """Return the credentials by which a connection calls its target."""
    credentials: Credentials = only_server(F).route.target_stub._grpc._rpcs._credentials
    return credentials


def test_headers_travel_beside_the_token_and_stay_with_copies() -> None:
    credentials = Credentials(lambda: TOKEN, Tls()).with_header("deconvd-affinity", "7")
    expected = (("authorization", f"Bearer {TOKEN}"), ("deconvd-affinity", "7"))

    assert credentials.metadata() == expected
    assert credentials.for_name("host").metadata() == expected
    assert credentials.without_tls().metadata() == expected
    assert NO_CREDENTIALS.with_header("a", "b").metadata() == (("a", "b"),)


def test_the_name_of_a_host_counts_unless_another_was_given() -> None:
    named = Credentials(tls=Tls()).for_name("host")

    assert named.tls == Tls(server_name="host")
    assert named.for_name("other").tls == Tls(server_name="host")
    assert NO_CREDENTIALS.for_name("host").tls is None
