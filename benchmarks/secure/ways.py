"""What is timed: our calls by each path, plain, with a token and with TLS, and calls of the bare program."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np

import deconvd_client
from benchmarks.certificates import write_certificate
from benchmarks.transport.paths import ONE, TCP, UNIX, RoundTrip, run_server
from deconvd.host.system import processors_count
from deconvd.model.dtypes import Array
from deconvd_client import Connection, Tls
from deconvd_client.cli.bare_sockets import BareCertificate, bare_calls, bare_server
from deconvd_client.transports.direct.striping_policy import StripingPolicy
from deconvd_server.access.tokens import TokenHash, new_token

__all__ = ["BareCalls", "BarePrograms", "BareWay", "Keys", "Way", "open_ways"]

_PATHS: Final = {
    UNIX: {"shared_memory": "shared_memory", "unix": "unix"},
    TCP: {"tcp": "tcp", "grpc_tcp": "grpc"},
}
"""The transports of our client by paths, which are named as in `benchmarks.transport`, by where the server listens."""


class Way(NamedTuple):
    """How our calls are made.

    Attributes:
        path: How tensors travel.
        secured: ``plain``, ``token`` or ``tls``.
    """

    path: str
    secured: str


class BareWay(NamedTuple):
    """How calls of the bare program are made.

    Attributes:
        socket: ``unix``, ``tcp`` or ``tls``.
        connections_count: How many connections share the bytes of a call.
    """

    socket: str
    connections_count: int


BareCalls: TypeAlias = Mapping[BareWay, Callable[[], None]]
"""What makes calls of the bare program."""


@dataclass(frozen=True)
class Keys:
    """What servers and clients prove who they are with.

    Attributes:
        certificate: The server's, for 127.0.0.1.
        ca: File with the certificate of its authority.
        tokens: File of tokens.
        token: One of them.
    """

    certificate: BareCertificate
    ca: Path
    tokens: Path
    token: str

    @classmethod
    def make(cls, directory: Path) -> Keys:
        """Return new ones, whose files are in a directory that exists."""
        cert, key, ca = write_certificate(directory, "127.0.0.1")
        tokens = directory / "tokens"
        token = new_token()
        tokens.write_text(TokenHash.of("benchmark", token).as_line() + "\n")
        tokens.chmod(0o600)
        return cls(BareCertificate(cert, key), ca, tokens, token)


@contextmanager
def open_ways(keys: Keys) -> Iterator[dict[Way, RoundTrip]]:
    """Run our server plain, with tokens and with TLS, and give what calls it by each path."""
    with ExitStack() as stack:

        def connect(target: str, transport: str, secured: str) -> Connection:
            return stack.enter_context(
                deconvd_client.connect(
                    target,
                    transport=transport,
                    token=keys.token if secured == "token" else None,
                    tls=Tls(ca=keys.ca) if secured == "tls" else False,
                )
            )

        ways: dict[Way, RoundTrip] = {}
        options = {
            "plain": (),
            "token": (str(keys.tokens),),
            "tls": ("", *map(str, keys.certificate)),
        }
        for address, paths in _PATHS.items():
            for secured, secured_options in options.items():
                if secured == "tls" and address == UNIX:
                    continue  # Unix sockets have none
                target = stack.enter_context(run_server("deconvd", address, *secured_options))
                for path, transport in paths.items():
                    F = connect(target, transport, secured)
                    ways[Way(path, secured)] = partial(_round_trip, F)
        yield ways


def _round_trip(F: Connection, x: Array) -> Array:
    return F.deconvolution_2d(x, ONE)


class BarePrograms:
    """Runs the servers of the bare program: at a Unix socket, by TCP, and by TCP with TLS.

    Args:
        keys: Has the certificate that the last of them shows.
    """

    def __init__(self, keys: Keys) -> None:
        self._tls = ssl.create_default_context(cafile=keys.ca)
        self._certificate = keys.certificate
        self._stack = ExitStack()
        self._addresses: dict[str, str] = {}

    def __enter__(self) -> BarePrograms:
        certificates = {"unix": None, "tcp": None, "tls": self._certificate}
        for name, certificate in certificates.items():
            server = bare_server(is_unix=name == "unix", certificate=certificate)
            self._addresses[name] = self._stack.enter_context(server)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def calls(self, x: Array) -> Iterator[BareCalls]:
        """Connect, and give what moves an array of bytes there and as many back, by as many connections as ours."""
        sent = np.frombuffer(x.tobytes(), np.uint8)
        received = np.ones_like(sent)
        with ExitStack() as stack:
            yield {
                BareWay(name, count): stack.enter_context(
                    bare_calls(address, count, sent, received, self._tls if name == "tls" else None)
                )
                for name, address in self._addresses.items()
                for count in _connections_counts(x)
            }


def _connections_counts(x: Array) -> Sequence[int]:
    """Return the numbers of connections that our client may have for a call."""
    stripes_counts = StripingPolicy(processors_count).candidates(2 * x.nbytes)
    return [max(count, 1) for count in stripes_counts]
