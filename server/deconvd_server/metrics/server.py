"""Serves metrics over HTTP, on a port of their own, with the same TLS and credentials as calls.

ACCEPTED --TLS, head of the request--> READ --who asks, metrics--> ANSWERED --> closed
    |                                    |
    `--too slow, or others need the place, or it breaks a rule--> closed

It needs nothing of what serves calls: so it answers while the server starts, is overloaded, or drains.

Locks: `_lock` guards the streams and is taken alone. `_making` is held while a response is made, which takes the locks
of what is counted.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import make_wsgi_app
from prometheus_client.registry import Collector

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from deconvd.errors import UnauthenticatedError, UnavailableError
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.bearer_token import bearer_token
from deconvd_server.access.caller_pass import shown_certificate
from deconvd_server.access.caller_proof import CallerProof
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.metrics.request import (
    BadRequestError,
    Request,
    accepted_encodings,
    accepted_formats,
    find_end,
    parse_head,
    response,
)
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.peer_identity import peer_key_of_connection
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.transports.grpc.callers import log_refusal

__all__ = ["MetricsServer", "metrics_response"]

_CONNECTIONS_COUNT: Final = 16
"""Connections at the same time. Each has a thread while it is open, and some have two scrapers or three."""

_RESERVED_COUNT: Final = 4
"""How many of them are for peers that have none."""

_REQUEST_S: Final = 10.0
"""How long a client may take for TLS and its request. Prometheus itself waits for ten seconds by default."""

_RESPONSE_S: Final = 10.0
"""How long it may take to read the response."""

_UNDISTURBED_S: Final = 1.0
"""How long it may read while others need the place."""

_DRAIN_S: Final = 1.0
"""How long it may take to close the connection then."""

_READ_BYTES: Final = 4096

_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves ``GET /metrics``. One thread accepts connections, and a few others serve one request each.

    Peers share the connections (`deconvd_server.resources.fair_shares`). Where there are too few, one that has not
    sent its request yet is closed: strangers cannot keep a scraper out that sends its own at once.

    Args:
        listeners: Sockets that listen. This object closes them.
        authenticator: Says who readers are.
        tls: How connections are encrypted; None if they are not.
        collector_for: Returns the metrics that a reader may see, by the name that it has proved, which may be empty.

    Attributes:
        addresses: Where it listens.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        authenticator: Authenticator,
        tls: ServerTls | None,
        collector_for: Callable[[str], Collector],
    ) -> None:
        self.addresses = [_describe_address(listener) for listener in listeners]
        self._authenticator = authenticator
        self._tls = tls
        self._collector_for = collector_for
        self._shares = FairShares(
            _CONNECTIONS_COUNT, _RESERVED_COUNT, "connections for metrics", log_level=logging.DEBUG
        )
        self._workers = Workers(_CONNECTIONS_COUNT, 1, name="metrics")
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: set[_Exchange] = set()  # for a thread
        self._streams: set[SocketStream] = set()
        self._listener = Listener("connections for metrics", (), listeners, self._accept, _go_on)
        self._thread = threading.Thread(
            target=self._listener.run, name="metrics-listener", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Accept no more connections, break those that there are, and stop."""
        self._listener.stop()
        self._thread.join()
        self._listener.close()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.shutdown()
        self._workers.close()

    def _accept(self, connection: socket.socket, address: Any) -> None:
        """Give a connection a place and a thread, or close it. Raises as `Listener` allows."""
        peer_key = peer_key_of_connection(connection, address)
        engine = None if self._tls is None else TlsEngine(self._tls.current().context, None)
        stream = SocketStream(connection) if engine is None else TlsStream(connection, engine)
        exchange = _Exchange(stream, engine, f"tcp: {address[0]}:{address[1]}", peer_key)
        try:
            exchange.place = self._shares.take(peer_key, partial(self._drop, exchange))
            exchange.place.is_idle = True  # until it has sent its request
            with self._lock:
                self._waiting.add(exchange)
                self._streams.add(stream)
            self._workers.submit(partial(self._serve, exchange))
        except UnavailableError as error:
            _log.debug("no metrics for %s: %s", exchange.peer, error)
            self._close(exchange)
        except BaseException:
            self._close(exchange)
            raise

    def _drop(self, exchange: _Exchange) -> None:
        """Break a connection, since others need its place, and free that at once: threads may be slow to run."""
        exchange.free_place()
        if self._has_waited(exchange):
            self._close(exchange)
        else:
            exchange.stream.shutdown()  # its thread, which is one of a few, closes it

    def _has_waited(self, exchange: _Exchange) -> bool:
        """Return whether a connection waits for a thread, and let it wait no longer."""
        with self._lock:
            if exchange not in self._waiting:
                return False
            self._waiting.remove(exchange)
            return True

    def _serve(self, exchange: _Exchange) -> None:
        """Answer one request, and close the connection."""
        if not self._has_waited(exchange):
            return
        try:
            answer = self._answer(exchange)
            exchange.begin_response()
            exchange.stream.write(answer)
            exchange.stream.half_close_and_drain(_DRAIN_S)
        except ConnectionBrokenError as error:
            _log.debug("no metrics for %s: %s", exchange.peer, error)
        finally:
            self._close(exchange)

    def _close(self, exchange: _Exchange) -> None:
        exchange.stream.close()
        exchange.free_place()
        with self._lock:
            self._waiting.discard(exchange)
            self._streams.discard(exchange.stream)

    def _answer(self, exchange: _Exchange) -> bytes:
        """Read a request, and return the response."""
        try:
            request = parse_head(exchange.read_head())
            identity = exchange.identify(request, self._authenticator)
            exchange.note_request()
            with self._making:  # one at a time: several would take the interpreter from calls
                return metrics_response(request, self._collector_for(identity))
        except BadRequestError as error:
            return _error_response(error.status, str(error))
        except UnauthenticatedError as error:
            log_refusal("/metrics", exchange.peer, error)
            return _error_response(HTTPStatus.UNAUTHORIZED, "a valid token is needed")
        except ConnectionBrokenError:
            raise
        except Exception:  # noqa: BLE001 - logged, and the scraper is told that there is no answer
            _log.exception("unforeseen error in a scrape")
            return _error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "see the server's log")


class _Exchange:
    """One connection, and the request that comes by it.

    Attributes:
        stream: The connection.
        peer: The client's address, for the log.
        place: Its place among all connections.
    """

    def __init__(
        self, stream: SocketStream, engine: TlsEngine | None, peer: str, peer_key: str
    ) -> None:
        self.stream = stream
        self.peer = peer
        self.place: PeerPlace | None = None
        self._engine = engine
        self._peer_key = peer_key
        stream.set_deadline(_REQUEST_S)

    def read_head(self) -> bytes:
        """Return the head of the request.

        Raises:
            BadRequestError: It is too long.
            ConnectionBrokenError: The client has gone, is too slow, or breaks a rule of TLS.
        """
        if isinstance(self.stream, TlsStream):
            self.stream.shake_hands()
        data = bytearray()
        buffer = memoryview(bytearray(_READ_BYTES))
        while not (end := find_end(data)):
            data += buffer[: self.stream.read_into(buffer)]
        return bytes(data[:end])

    def identify(self, request: Request, authenticator: Authenticator) -> str:
        """Return the name that the client has proved; empty if it need not prove any.

        Raises:
            UnauthenticatedError: It must prove who it is, and has not.
        """
        token = ""
        if authenticator.takes_tokens:
            token = bearer_token(request.headers.get_all("Authorization", []))
        certificate = {} if self._engine is None else self._engine.peer_certificate
        proof = CallerProof(
            authenticator,
            self._peer_key,
            token=token,
            certificate=shown_certificate(certificate),
            is_local=False,
        )
        return proof.identify().identity

    def note_request(self) -> None:
        """Keep the place while the response is made."""
        if self.place is not None:
            self.place.is_idle = False

    def begin_response(self) -> None:
        """Set the deadline for the response. After a second others may have the place.

        The time is in the future, so that places of clients that have sent no request are taken first until then.
        """
        self.stream.set_deadline(_RESPONSE_S)
        if self.place is not None:
            self.place.progressed_s = time.monotonic() + _UNDISTURBED_S
            self.place.is_idle = True

    def free_place(self) -> None:
        if self.place is not None:
            self.place.free()


def _go_on(_thread: str) -> None:
    """Do nothing if the listener's thread is lost, as the log tells: calls go on, and Prometheus notices."""


def metrics_response(request: Request, collector: Collector) -> bytes:
    """Return the metrics, in the form that the request asks for: prometheus-client knows them all."""
    heads: list[tuple[str, list[tuple[str, str]]]] = []
    environment = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/metrics",
        "HTTP_ACCEPT": accepted_formats(request.headers),
        "HTTP_ACCEPT_ENCODING": accepted_encodings(request.headers),
    }
    body = make_wsgi_app(collector)(
        environment, lambda status, headers: heads.append((status, headers))
    )
    ((status, headers),) = heads
    return response(status, headers, b"".join(body), is_head=request.is_head)


def _error_response(status: HTTPStatus, text: str) -> bytes:
    headers = [("Content-Type", "text/plain; charset=utf-8")]
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", "Bearer"))
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    return response(f"{status.value} {status.phrase}", headers, f"{text}\n".encode())


def _describe_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
