"""TLS without I/O: the bytes of a network to those that the peer has written, and back."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.wire.codec import Buffer

__all__ = ["MAX_RECORD_BYTES", "TlsEngine"]

MAX_RECORD_BYTES: Final = (16 << 10) + 256
"""The largest record of TLS, which is what is encrypted at once."""

_MAX_UNSENT_BYTES: Final = 4 << 10
"""How much TLS may have to answer to a peer before anything is written.

OpenSSL answers each request for new keys. A peer that does nothing else would fill the memory.
"""


class TlsEngine:
    """One end of a TLS connection. Nothing here waits.

    To receive, the caller gives what has come from the network to `feed`, and calls `decrypt_into` until it returns 0.
    To send, it gives its data to `encrypt`, and sends what that returns before it calls `encrypt` again.

    One thread may receive while another sends. OpenSSL's object is made for one thread at a time, and before Python
    3.13 nothing else sees to that. So a lock is held while OpenSSL works, for as long as it takes to encrypt or decrypt
    some records. It is never held while anything is waited for.

    What TLS itself has to say while the caller receives, for example that it has new keys, is sent before the next
    data. TLS allows that, and no second thread needs to send.

    Args:
        context: What certificates to show and trust.
        server_name: On a client, the name that the server's certificate must have. On a server, None.

    Attributes:
        has_received: Whether `decrypt_into` may have something to return.
        is_established: Whether the handshake is complete.
        peer_certificate: The peer's certificate, as `ssl.SSLObject.getpeercert` has it. It is empty before the
            handshake is complete, if the peer has shown none, and if a name in it is no text, for which `ssl` has no
            form: an authority may have signed it all the same.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        self.has_received = False
        self.is_established = False
        self.peer_certificate: Mapping[str, Any] = {}
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        # bound once, as each record needs them
        self._read = cast("Callable[[int, memoryview], int]", self._tls.read)
        self._write = self._tls.write
        self._take = self._outgoing.read
        self._lock = threading.Lock()
        self._failure = ""

    def shake_hands(self) -> bool:
        """Go on with the handshake, and return whether it is complete. Send `take_unsent` after it, whatever happens.

        Raises:
            ConnectionClosedError: The handshake has failed.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLError, ValueError) as error:
            raise ConnectionClosedError(_describe(error)) from None
        # OpenSSL tells it now, and no longer once a later record is damaged
        with suppress(UnicodeDecodeError, ssl.SSLError):
            self.peer_certificate = self._tls.getpeercert() or {}
        self.is_established = True
        self.has_received = True  # data may have come with the last message
        return True

    def feed(self, data: Buffer) -> None:
        """Take what has come from the network."""
        with self._lock:
            self._incoming.write(data)
            self.has_received = True

    def decrypt_into(self, target: memoryview, received: Buffer | None = None) -> int:
        """Put what the peer has written into the start of `target`, as far as it is there. Return the number of bytes.

        Args:
            received: What has come from the network, as for `feed`. One call costs less than two.

        Raises:
            ConnectionClosedError: The peer has ended the connection, or broken the rules of TLS.
        """
        if received is None and not self.has_received:
            return 0
        if self._failure:
            raise ConnectionClosedError(self._failure)
        filled, size_bytes = 0, len(target)
        incoming, read = self._incoming, self._read
        with self._lock:
            if received is not None:
                incoming.write(received)
            self.has_received = True
            try:
                while filled < size_bytes:
                    wanted = size_bytes - filled
                    count = read(wanted, target[filled:] if filled else target)
                    if not count:
                        self._failure = "the peer has closed the connection"
                        break
                    filled += count
                    # a record of which less was taken than there was room for is at its end
                    if count < wanted and not incoming.pending:
                        self.has_received = False
                        break
            except ssl.SSLWantReadError:
                self.has_received = False
            except ssl.SSLError as error:
                self._failure = _describe(error)
            if self._outgoing.pending > _MAX_UNSENT_BYTES:
                self._failure = "the peer sends messages of TLS, and no data"
        if self._failure:
            self.has_received = True  # what has come before is taken first, and then the failure
            if not filled:
                raise ConnectionClosedError(self._failure)
        elif filled == size_bytes and not (incoming.pending or self._tls.pending()):
            self.has_received = False
        return filled

    def encrypt(self, data: Buffer) -> bytes:
        """Return what to send for some data, and for all that TLS has to say before."""
        with self._lock:
            try:
                self._write(data)
            except ssl.SSLError as error:
                raise ConnectionClosedError(_describe(error)) from None
            return self._take()

    def take_unsent(self) -> bytes:
        """Return what TLS has to say: parts of the handshake, or why it has failed."""
        with self._lock:
            return self._outgoing.read()

    def end(self) -> bytes:
        """Return what tells the peer that nothing more is sent, so that it can tell this end from a cut."""
        with self._lock:
            with suppress(ssl.SSLError):  # it wants to hear the peer's end, or there was an error
                self._tls.unwrap()
            return self._outgoing.read()


def _describe(error: Exception) -> str:
    """Return the words for an error of OpenSSL, without its file and line numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate cannot be trusted: {error.verify_message}"
    reason = getattr(error, "reason", None) or str(error)
    return f"TLS has failed: {reason.replace('_', ' ').lower()}"
