"""TLS without sockets: each end of a handshake, and of what follows, against one whose bytes are damaged."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Final

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.tls_engine import TlsEngine
from deconvd_client.credentials import Credentials
from deconvd_server.access.caller_pass import certificate_name
from deconvd_server.access.server_tls import ServerTls
from tests.fuzz.case import Case, Seed
from tests.fuzz.certificates import NAME, Signer, unsigned_certificates
from tests.fuzz.edits import EDITS, apply_edits
from tests.fuzz.target import Target

__all__ = ["TlsEnds"]

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_DATA: Final = bytes(range(256)) * 100
"""More than one record has."""

_MOST_FLIGHTS: Final = 8
_MOST_UNSENT_BYTES: Final = 64 << 10


def _seeds() -> Iterator[Seed]:
    """Yield scripts of edits: of an end's first flight, of its second one, and of the data after them."""
    for version in _VERSIONS:
        for end in ("client", "server"):
            for number in range(3):
                for script in EDITS[number::3]:
                    parts = [script if place == number else b"" for place in range(3)]
                    yield Seed(f"{end} {version}", parts, is_list=False)
    for unsigned in unsigned_certificates():
        for end in ("client", "server"):
            for _ in range(8):
                yield Seed(f"{end} certificate", [unsigned], is_list=False)


class TlsEnds(Target):
    """Both ends. One whose peer sends something else fails by its own error, and never has data that was not sent."""

    seeds = (*_seeds(),)
    batch_count = 500
    bounded_count = 250
    share = 6

    def open(self, stack: ExitStack) -> None:
        self._signer = Signer(self.directory)
        self._good = self._signer.sign(unsigned_certificates()[1])
        self._clients = {version: self._client_context() for version in _VERSIONS}
        self._servers = {version: self._server_context() for version in _VERSIONS}
        for version, number in _VERSIONS.items():
            self._clients[version].maximum_version = number
            self._servers[version].maximum_version = number
        for seed in self.seeds:
            if not any(seed.to_case().parts):
                assert self._exchange(seed.to_case()) == _DATA

    def _client_context(self) -> ssl.SSLContext:
        state = Credentials(tls=self._signer.tls(self._good)).tls_state
        assert state is not None
        return state.context

    def _server_context(self) -> ssl.SSLContext:
        signer = self._signer
        tls = ServerTls(self._good, signer.key, signer.ca)
        return tls.current().context

    def feed(self, case: Case) -> None:
        if case.kind.endswith("certificate"):
            self._show(case)
        else:
            received = self._exchange(case)
            assert _DATA.startswith(received)

    def _exchange(self, case: Case) -> bytes:
        """Return what one end has received of what a damaged one has sent."""
        who, version = case.kind.split()
        client = TlsEngine(self._clients[version], "localhost")
        server = TlsEngine(self._servers[version], None)
        damaged, other = (client, server) if who == "client" else (server, client)
        scripts = [*case.parts]
        _shake_hands(
            client, server, lambda end: scripts.pop(0) if end is damaged and scripts else b""
        )
        assert len(other.take_unsent()) <= _MOST_UNSENT_BYTES
        if not (damaged.is_established and other.is_established):
            return b""
        assert certificate_name(other.peer_certificate) == NAME
        return _receive(other, apply_edits(damaged.encrypt(_DATA), case.parts[-1]))

    def _show(self, case: Case) -> None:
        """Show a certificate that was damaged before it was signed."""
        cert = self._signer.sign(case.parts[0], "shown")
        client_context, server_context = self._clients["1.3"], self._servers["1.3"]
        try:
            if case.kind.startswith("client"):
                client_context = self._client_context()
                client_context.load_cert_chain(cert, self._signer.key)
            else:
                server_context = self._server_context()
                server_context.load_cert_chain(cert, self._signer.key)
        except ssl.SSLError:
            return  # nobody can show it
        client, server = TlsEngine(client_context, "localhost"), TlsEngine(server_context, None)
        _shake_hands(client, server, lambda _: b"")
        for end in (client, server):
            if end.is_established:
                assert certificate_name(end.peer_certificate).isprintable()


def _shake_hands(
    client: TlsEngine, server: TlsEngine, script_for: Callable[[TlsEngine], bytes]
) -> None:
    """Let two ends shake hands, as far as they can; what one sends is edited by the next script for it."""
    ends: Sequence[tuple[TlsEngine, TlsEngine]] = ((client, server), (server, client))
    for number in range(_MOST_FLIGHTS):
        here, there = ends[number % 2]
        with suppress(ConnectionClosedError):
            if not here.is_established:
                here.shake_hands()
        sent = here.take_unsent()
        if sent:
            there.feed(apply_edits(sent, script_for(here)))


def _receive(end: TlsEngine, sent: bytes) -> bytes:
    """Return what an end decrypts, until it has all or fails."""
    received = b""
    buffer = memoryview(bytearray(5000))
    end.feed(sent)
    with suppress(ConnectionClosedError):
        while count := end.decrypt_into(buffer):
            received += buffer[:count]
    return received
