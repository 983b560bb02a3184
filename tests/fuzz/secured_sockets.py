"""Bytes to a real server with TLS that asks who calls: handshakes, certificates, tokens, and data under them."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import ANY_INSTANCE, Hello
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd_client.credentials import Credentials
from tests.fuzz.case import Case, Seed
from tests.fuzz.certificates import Signer, nameless, unsigned_certificates
from tests.fuzz.edits import EDITS
from tests.fuzz.frames import INSTANCE, TOKEN, client_sequences
from tests.fuzz.http2_frames import authorized_call, http2_sequences, read_answer
from tests.fuzz.requests import W, X
from tests.fuzz.served import ServerTarget
from tests.fuzz.sockets import connect_unix
from tests.fuzz.tls_peer import TlsPeer
from tests.token_calls import write_tokens

__all__ = ["SecuredSockets"]

_DATA: Final = Path(__file__).parents[1] / "data"
_TIMEOUT_S: Final = 20.0
_SILENCE_S: Final = 0.05
"""How long an answer is waited for where there may be none."""

_BEARER: Final = b"Bearer " + TOKEN.encode()
_SECRET: Final = TOKEN[4:].encode()
_STRANGER: Final = b"Bearer dcd_" + b"s" * 43


def _records(version: str) -> list[bytes]:
    """Return what a client has sent once: records of a handshake, of data and of its end."""
    data = (_DATA / f"fuzzed-tls-{version}.bin").read_bytes()
    records = []
    while data:
        size = 5 + int.from_bytes(data[3:5], "big")
        records.append(data[:size])
        data = data[size:]
    return records


def _seeds() -> Iterator[Seed]:
    for way in ("direct", "grpc"):
        for version in ("1.2", "1.3"):
            for _ in range(8):
                yield Seed(f"{way} records", _records(version))
            for number in range(3):
                for script in EDITS[number::9]:
                    parts = [script if place == number else b"" for place in range(3)]
                    yield Seed(f"{way} edits {version}", parts, is_list=False)
        for unsigned in unsigned_certificates():
            yield Seed(f"{way} certificate", [unsigned], is_list=False)
    for sequence in client_sequences():
        for place in ("tls", "unix"):
            yield Seed(f"direct frames {place}", sequence)
    for token in ("", "dcd_" + "s" * 43, TOKEN):
        for place in ("tls", "unix"):
            for _ in range(3):
                yield Seed(f"direct frames {place}", [Hello(ANY_INSTANCE, token).pack()])
    for sequence in http2_sequences():
        yield Seed("grpc frames tls", sequence)
    for values in ([_BEARER], [_STRANGER], [b"bearer " + TOKEN.encode()], [_BEARER, _STRANGER]):
        for place in ("tls", "unix"):
            for _ in range(3):
                yield Seed(f"grpc authorization {place}", values)


class SecuredSockets(ServerTarget):
    """A server with TLS, an authority of clients, and tokens. It answers nobody who has not proved who it is."""

    seeds = (*_seeds(),)
    batch_count = 200
    limit_s = 30.0
    bounded_count = 150
    share = 2
    unwanted = (*ServerTarget.unwanted, _SECRET)

    def options(self) -> Sequence[str]:
        self._signer = Signer(self.directory)
        self._cert = self._signer.sign(unsigned_certificates()[1])
        self._nameless = self._signer.sign(nameless(), "nameless")
        tokens = write_tokens(self.directory / "tokens", {TOKEN: "fuzz"})
        files = {
            "--tls-cert": self._cert,
            "--tls-key": self._signer.key,
            "--tls-client-ca": self._signer.ca,
            "--tokens": tokens,
        }
        words = [word for option, path in files.items() for word in (option, str(path))]
        return [*super().options(), *words]

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        path = Path(self.server.target.removeprefix("unix:"))
        host, _, port = self.server.targets[1].rpartition(":")
        direct_port = self.F.server_info().direct_port
        connect_to = socket.create_connection
        self._connect: dict[tuple[str, bool], Callable[[], socket.socket]] = {
            ("grpc", False): partial(connect_to, (host, int(port)), _TIMEOUT_S),
            ("direct", False): partial(connect_to, (host, direct_port), _TIMEOUT_S),
            ("grpc", True): partial(connect_unix, str(path), socket.SOCK_STREAM),
            ("direct", True): partial(connect_unix, f"{path}.calls", socket.SOCK_STREAM),
        }
        ways = ("grpc", "direct")
        # the server asks for a certificate: by one without a name the token counts alone
        self._contexts = {way: self._context(way, self._nameless) for way in ways}
        self._newer = {way: self._context(way, self._cert) for way in ways}
        self._older = {way: self._context(way, self._cert) for way in ways}
        for context in self._older.values():
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        for is_local in (False, True):
            self._check_served(is_local=is_local)
        self.check()

    def _context(self, way: str, cert: Path) -> ssl.SSLContext:
        state = Credentials(tls=self._signer.tls(cert)).tls_state
        assert state is not None
        if way == "grpc":
            state.context.set_alpn_protocols(["h2"])
        return state.context

    def _check_served(self, *, is_local: bool) -> None:
        """See that a caller with a token is answered, and one with another token is not."""
        place = "unix" if is_local else "tls"
        for token in (TOKEN, TOKEN.swapcase()):
            hello = Hello(ANY_INSTANCE, token).pack()
            answer = self._send_frames(Case(f"direct frames {place}", (hello,)), _TIMEOUT_S)
            assert bool(answer) == (token == TOKEN), (place, token, answer)
        for value in (_BEARER, _STRANGER):
            self._authorize(Case(f"grpc authorization {place}", (value,)))

    def feed(self, case: Case) -> None:
        way, what, *rest = case.kind.split()
        if what == "records":
            with self._connect[way, False]() as end:
                peer = TlsPeer(end, None)
                peer.send(b"".join(case.parts))
                peer.end()
        elif what == "edits":
            self._edit(way, rest[0], case)
        elif what == "certificate":
            self._show(way, case)
        elif what == "frames":
            answer = self._send_frames(case, _SILENCE_S)
            assert not answer or self._may_have(way, answer, case), f"answered by {answer[:100]!r}"
        else:
            self._authorize(case)

    def _edit(self, way: str, version: str, case: Case) -> None:
        """Shake hands, and send some data, with damage on the way."""
        context = (self._older if version == "1.2" else self._newer)[way]
        with self._connect[way, False]() as end:
            peer = TlsPeer(end, context, case.parts)
            if peer.shake_hands(_SILENCE_S):
                hello = Hello(ANY_INSTANCE, TOKEN).pack()
                peer.send(hello if way == "direct" else authorized_call([_BEARER]))
                peer.wait(bool, _SILENCE_S)
            peer.end()

    def _show(self, way: str, case: Case) -> None:
        """Show a certificate that was damaged before it was signed."""
        cert = self._signer.sign(case.parts[0], "shown")
        context = self._context(way, self._cert)
        try:
            context.load_cert_chain(cert, self._signer.key)
        except ssl.SSLError:
            return  # nobody can show it
        with self._connect[way, False]() as end:
            peer = TlsPeer(end, context)
            if peer.shake_hands():
                peer.send(Hello(ANY_INSTANCE).pack() if way == "direct" else authorized_call([]))
                peer.wait(bool, _SILENCE_S)
            peer.end()

    def _send_frames(self, case: Case, patience_s: float) -> bytes:
        """Send frames, and return the answer."""
        way, _, place = case.kind.split()
        is_local = place == "unix"
        with self._connect[way, is_local]() as end:
            peer = TlsPeer(end, None if is_local else self._contexts[way])
            assert peer.shake_hands()
            peer.send(b"".join(case.parts))
            peer.wait(bool, patience_s)
            return peer.end()

    def _may_have(self, way: str, answer: bytes, case: Case) -> bool:
        """Return whether what was sent allows the answer."""
        sent = b"".join(case.parts)
        if way == "grpc":
            return not read_answer(answer)[0] or TOKEN.encode() in sent
        token = _token_in(sent)
        return token == TOKEN or (case.kind.endswith("unix") and token == "")

    def _authorize(self, case: Case) -> None:
        """Make a call with values as its authorization: it is served if they are one, and that is right."""
        *_, place = case.kind.split()
        is_local = place == "unix"
        with self._connect["grpc", is_local]() as end:
            peer = TlsPeer(end, None if is_local else self._contexts["grpc"])
            assert peer.shake_hands()
            peer.send(authorized_call(case.parts))
            peer.wait(lambda answer: read_answer(answer)[1], _TIMEOUT_S)
            is_served, has_ended = read_answer(peer.end())
        scheme, _, token = (case.parts[0] if case.parts else b"").strip(b" \t").partition(b" ")
        is_right = len(case.parts) == 1 and (scheme.lower(), token) == (b"bearer", TOKEN.encode())
        is_right |= is_local and not case.parts
        assert is_served == is_right, f"served: {is_served}, ended: {has_ended}"

    def check(self) -> None:
        super().check()
        tls = self._signer.tls(self._nameless)
        with deconvd_client.connect(
            self.server.targets[1], tls=tls, token=TOKEN, transport="tcp", timeout_s=60
        ) as F:
            np.testing.assert_array_equal(F.deconvolution_2d(X, W), self._y)


def _token_in(sent: bytes) -> str | None:
    """Return the token of a client's greeting; None if there is no greeting."""
    protocol = DirectProtocol(Role.SERVER, INSTANCE)
    try:
        while sent:
            buffer = protocol.receive_buffer()
            count = min(len(buffer), len(sent))
            buffer[:count] = sent[:count]
            sent = sent[count:]
            protocol.note_received(count)
            if (event := protocol.next_event()) is not None:
                assert isinstance(event, Hello)
                return event.token
    except ConnectionBrokenError:
        pass
    return None
