"""The options of deconvd-server that say who may call: how they fit together, and what is refused."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from deconvd.command_line import NamedPath, WholeNumber
from deconvd.errors import InvalidArgumentError
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.exposure import is_beyond_loopback, name_in_certificate
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.access.tokens import TokenFile
from deconvd_server.transports.listen import host_of

__all__ = ["AccessPolicy", "ExposedAddressError", "add_access_options", "load_access_policy"]

_log = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])

_FILE: Final = NamedPath(dir_okay=False, path_type=Path)

_REFUSAL: Final = """\
other hosts can reach {address}, so the server must know its callers. Type these two lines, and add --tls-cert \
cert.pem --tls-key key.pem --tokens tokens.txt (or --insecure, to serve everyone who can reach it, unencrypted):
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN={name} -addext \
subjectAltName={kind}:{name} -addext keyUsage=critical,digitalSignature,keyCertSign -keyout key.pem -out cert.pem
  deconvd-server token new NAME --tokens tokens.txt"""
"""Clients may trust the certificate itself as its authority. OpenSSL's strict checks, which Python 3.13 turns on, want
the key usage."""


def _parse_names(
    _context: click.Context, _parameter: click.Parameter, names: str | None
) -> tuple[str, ...]:
    """Return the names in a list as in ``prometheus,team-a``."""
    given = tuple(names.split(",")) if names else ()
    if not all(name.isprintable() and name == name.strip() and name for name in given):
        raise click.BadParameter(f"{names!r} is not a list of names, as in prometheus,grafana")
    return given


_OPTIONS: Final = (
    click.option(
        "--tls-cert",
        type=_FILE,
        default=None,
        metavar="FILE",
        show_default="TCP is not encrypted",
        help="The server's certificate, and those between it and its authority, in PEM. Unix sockets are never "
        "encrypted.",
    ),
    click.option(
        "--tls-key",
        type=_FILE,
        default=None,
        metavar="FILE",
        show_default="none",
        help="The key of --tls-cert, in PEM and without a password.",
    ),
    click.option(
        "--tls-client-ca",
        type=_FILE,
        default=None,
        metavar="FILE",
        show_default="clients need no certificates",
        help="The certificates of those who may sign clients' certificates, in PEM. A client must then show one by "
        "TCP. The name in the certificate is the caller's, unless it has a token of --tokens.",
    ),
    click.option(
        "--tokens",
        type=_FILE,
        default=None,
        metavar="FILE",
        show_default="clients need no tokens",
        help="The tokens of which clients must show one by TCP, unless they have a certificate: see `deconvd-server "
        "token new --help`. All these files are read again when they change.",
    ),
    click.option(
        "--insecure",
        "is_insecure",
        is_flag=True,
        default=False,
        help="Listen beyond this host even without TLS or without knowing the callers.",
    ),
    click.option(
        "--health-port",
        type=WholeNumber(1, 65535),
        default=None,
        show_default="none",
        help="A TCP port, on the hosts of --listen, that serves gRPC health alone: unencrypted, and to everyone.",
    ),
    click.option(
        "--metrics-port",
        type=WholeNumber(0, 65535),
        default=None,
        show_default="none",
        help="A TCP port, on the hosts of --listen, that serves metrics to Prometheus at /metrics: with the same TLS, "
        "to the same callers. 0 for any free port.",
    ),
    click.option(
        "--metrics-readers",
        default=None,
        metavar="NAME[,...]",
        callback=_parse_names,
        show_default="none",
        help="Names of tokens or certificates that see the metrics of all callers. Others see those of their own "
        "calls. On a server that asks for no name everyone sees all.",
    ),
)


def add_access_options(command: _F) -> _F:
    """Give a command the options that say who may call."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class ExposedAddressError(click.ClickException):
    """The server would serve strangers, and nobody has said that it may."""

    exit_code = 2


@dataclass(frozen=True)
class AccessPolicy:
    """Who may call.

    Attributes:
        authenticator: Says who a caller is.
        tls: How connections by TCP are encrypted; None if they are not.
        proof: What proves who a caller is, in words; empty if nothing does.
        exposed_hosts: The hosts that it listens on beyond the loopback; empty if it need not be known.
    """

    authenticator: Authenticator
    tls: ServerTls | None
    proof: str
    exposed_hosts: Collection[str]

    def describe(self, address: str) -> str:
        """Return in words who may call by an address of the server."""
        host = host_of(address)
        if host is None:
            return "callers: all users who may open the socket"
        return f"{self._encryption}; callers: {self._callers(host)}"

    def describe_readers(self, address: str, readers: Collection[str]) -> str:
        """Return in words who may read the metrics at an address.

        Args:
            readers: The names that see all.
        """
        words = f"{self._encryption}; readers: {self._callers(host_of(address) or '')}"
        if not self.proof:
            return words
        return f"{words}; of all calls: {', '.join(readers) or 'nobody'}, of their own: the others"

    def check_readers(self, metrics_port: int | None, readers: Collection[str]) -> None:
        """Check the names that see all metrics.

        Raises:
            InvalidArgumentError: They would make no difference.
        """
        needed = "--tokens or --tls-client-ca" if metrics_port is not None else "--metrics-port"
        if readers and (metrics_port is None or not self.proof):
            raise InvalidArgumentError(
                f"--metrics-readers needs {needed}, too", argument="metrics_readers"
            )
        if metrics_port is not None and self.proof and not readers:
            _log.warning(
                "nobody sees the metrics of all callers, each only its own: --metrics-readers names who does"
            )

    @property
    def _encryption(self) -> str:
        return "not encrypted" if self.tls is None else "TLS"

    def _callers(self, host: str) -> str:
        if self.proof:
            return self.proof
        is_exposed = host in self.exposed_hosts
        return "everyone who can reach it" if is_exposed else "everyone on this host"


def load_access_policy(
    addresses: Sequence[str],
    *,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    tokens: Path | None,
    is_insecure: bool,
) -> AccessPolicy:
    """Return who may call, by the options.

    Args:
        addresses: Where the server is to listen.

    Raises:
        InvalidArgumentError: An option lacks another one, or its file cannot be used.
        ExposedAddressError: Other hosts can reach an address, and strangers on them could call.
        OSError: The name of a host cannot be resolved.
    """
    hosts = {address: host for address in addresses if (host := host_of(address)) is not None}
    tls = _load_tls(tls_cert, tls_key, tls_client_ca)
    proof = "" if tokens is None else f"tokens of {tokens}"
    if tls_client_ca is not None:
        proof = f"certificates of {tls_client_ca}" + (proof and f", with {proof} or without")
    exposed = {} if tls is not None and proof else _exposed_hosts(hosts)
    if exposed and not is_insecure:
        raise ExposedAddressError(_refusal(*next(iter(exposed.items()))))
    table = None if tokens is None else _load_tokens(tokens)
    authenticator = Authenticator(table, takes_certificates=tls_client_ca is not None)
    return AccessPolicy(authenticator, tls, proof, frozenset(exposed.values()))


def _exposed_hosts(hosts: Mapping[str, str]) -> dict[str, str]:
    """Return those of the hosts, by address, that other hosts can reach."""
    exposed = {}
    for address, host in hosts.items():
        try:
            if is_beyond_loopback(host):
                exposed[address] = host
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror}") from None
    return exposed


def _refusal(address: str, host: str) -> str:
    """Return why the server does not listen on an address, and what to do."""
    kind, name = name_in_certificate(host)
    return _REFUSAL.format(address=address, name=shlex.quote(name), kind=kind)


def _load_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    if cert is None:
        for name, path in (("tls_key", key), ("tls_client_ca", client_ca)):
            if path is not None:
                option = f"--{name.replace('_', '-')}"
                raise InvalidArgumentError(f"{option} needs --tls-cert, too", argument=name)
        return None
    if key is None:
        raise InvalidArgumentError("--tls-cert needs --tls-key, too", argument="tls_cert")
    for argument, path in (("tls_cert", cert), ("tls_key", key), ("tls_client_ca", client_ca)):
        if path is not None:
            _check_readable(argument, path)
    try:
        # With tokens, too: gRPC can require certificates or not ask for them, and nothing in between.
        return ServerTls(cert, key, client_ca)
    except (OSError, ValueError) as error:
        files = "--tls-cert and --tls-key" + (" and --tls-client-ca" if client_ca else "")
        raise InvalidArgumentError(
            f"{files} must be files with certificates and the key of the first one, in PEM: {error}",
            argument="tls_cert",
        ) from None


def _load_tokens(path: Path) -> TokenFile:
    _check_readable("tokens", path)
    try:
        return TokenFile(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"--tokens must be a file of tokens: {error}", argument="tokens"
        ) from None


def _check_readable(argument: str, path: Path) -> None:
    """Blame the right one of several options: an error of ssl does not name its file."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # without waiting for a pipe's writer
    except OSError as error:
        option = f"--{argument.replace('_', '-')}"
        raise InvalidArgumentError(
            f"{option} must be a file that can be read, got {path}: {error.strerror}",
            argument=argument,
        ) from None
