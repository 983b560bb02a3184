"""The addresses to listen on: how they are checked and bound, and how the socket of a dead server is taken over."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from deconvd.errors import InvalidArgumentError
from deconvd.host.system import MAX_UNIX_PATH_BYTES, is_valid_unix_path
from deconvd.wire.grpc_options import NOT_IN_UNIX_PATHS, has_authority, unix_path
from deconvd_server.resources.socket_file import Access, AddressInUseError, remove_dead_socket
from deconvd_server.resources.socket_lock import lock_path

__all__ = [
    "bind",
    "host_of",
    "listen_tcp",
    "release",
    "reserve_port",
    "side_hosts",
    "unix_path_to_bind",
    "unix_socket_paths",
]

_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/]+):(?P<port>[0-9]+)")
_EVERY_IPV4: Final = "0.0.0.0"  # noqa: S104 - nothing is bound here
_EVERY_IPV6: Final = "[::]"
_LOOPBACK: Final = "127.0.0.1"
_BACKLOG = 64
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_CLOSED_MASK = 0o777
"""A umask that leaves a new file to nobody but root."""

_log = logging.getLogger(__name__)


class PortBinder(Protocol):
    """The part of a gRPC server that `bind` uses."""

    def add_insecure_port(self, address: str) -> int:
        """Listen on an address, and return its port. Raises RuntimeError if that is not possible."""

    def add_secure_port(self, address: str, server_credentials: Any) -> int:
        """Do the same, with TLS."""


def bind(
    server: PortBinder,
    address: str,
    access: Access | None = None,
    server_credentials: object = None,
) -> str:
    """Make `server` listen on an address, and return the address with the port that it got.

    Args:
        address: ``host:port``, with port 0 for any free port; ``unix:path`` or ``unix:///path``. A socket file that a
            dead server left at the path is replaced.
        access: Who may open a Unix socket; None to leave that to the process's umask.
        server_credentials: The credentials of a TCP port, which has TLS then; None for no TLS. Unix sockets never
            have it.

    Raises:
        InvalidArgumentError: The address has another form, or gRPC does not take the credentials.
        AddressInUseError: Another process has the address.
        OSError: The system refuses the address for another reason.
    """
    host = host_of(address)
    if host is None:
        _bind_unix(server, unix_path_to_bind(address), address, access)
        return address
    port = _add_port(server, address, address, server_credentials)
    return f"{host}:{port}"


def unix_path_to_bind(address: str) -> Path:
    """Return the path of a Unix socket to listen on, from the root and without links if possible.

    Raises:
        InvalidArgumentError: The address has another form, or its directory does not exist.
    """
    path = _unix_path(address)
    if not path.parent.is_dir():
        raise _unix_error("in a directory that exists", address)
    return _canonical_path(path)


def host_of(address: str) -> str | None:
    """Return the host of an address to listen on; None for a Unix socket.

    Raises:
        InvalidArgumentError: The address has another form.
    """
    try:
        address.encode()
    except UnicodeEncodeError:  # gRPC's names are UTF-8
        raise InvalidArgumentError(
            f"--listen must be a name in UTF-8, got {address!r}", argument="listen"
        ) from None
    if address.startswith("unix:"):
        return None
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        raise InvalidArgumentError(
            f"--listen must be host:port or unix:path, got {address!r}", argument="listen"
        )
    if len(match["port"]) > len("65535") or int(match["port"]) > 65535:
        raise InvalidArgumentError(
            f"--listen must have a port from 0 to 65535, got {address!r}", argument="listen"
        )
    return match["host"]


def release(address: str) -> None:
    """Remove the socket file of an address that was bound, once its server has stopped."""
    if address.startswith("unix:"):
        path = _canonical_path(_unix_path(address))
        # Another server may listen there by now, or the whole directory may have been removed.
        try:
            with suppress(AddressInUseError, FileNotFoundError), lock_path(path):
                remove_dead_socket(path)
        except OSError as error:
            _log.warning("the file of a Unix socket cannot be removed: %s", error)


def side_hosts(addresses: Iterable[str]) -> list[str]:
    """Return where health alone, and metrics, are served: the hosts of `addresses`; loopback if all are Unix sockets.

    A host that a wildcard includes is left out: it could not be bound as well.
    """
    matches = filter(None, map(_HOST_PORT.fullmatch, addresses))
    hosts = list(dict.fromkeys(match["host"] for match in matches)) or [_LOOPBACK]
    if _EVERY_IPV6 in hosts:  # which is every IPv4 address, too
        hosts = [_EVERY_IPV6]
    elif _EVERY_IPV4 in hosts:
        hosts = [host for host in hosts if host == _EVERY_IPV4 or host.startswith("[")]
    return hosts


def listen_tcp(
    addresses: Iterable[str],
    port: int,
    purpose: str,
    *,
    shares_port: bool = False,
) -> list[socket.socket]:
    """Return sockets that listen on the hosts of `addresses`, all on one TCP port. Unix addresses are passed over.

    Args:
        addresses: Addresses that `bind` has returned.
        port: The port; 0 for any free port.
        purpose: What is served there, and by which option, for errors.
        shares_port: Whether other processes of this user may have the port, too: see `reserve_port`.

    Raises:
        AddressInUseError: Another process has the port.
    """
    listeners: list[socket.socket] = []
    try:
        for family, host in _tcp_addresses(addresses):
            listener = _open_listener(family, host, port, shares_port=shares_port)
            if listener is not None:
                listeners.append(listener)
                port = listener.getsockname()[1]  # the others must have the same
    except OSError as error:
        for listener in listeners:
            listener.close()
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)  # getaddrinfo's are negative
        raise AddressInUseError(
            errno.EADDRINUSE, f"cannot listen for {purpose}: {reason}", f"port {port}"
        ) from error
    return listeners


def reserve_port(addresses: Iterable[str], port: int, purpose: str) -> list[socket.socket]:
    """Return sockets that keep a TCP port on the hosts of `addresses`, for other processes of this user to listen on.

    No connection comes to these sockets. No process of another user can have the port while they are open, and none of
    this user that does not set SO_REUSEPORT.

    Args:
        addresses: ``host:port``; their ports are passed over, and Unix addresses, too.
        port: The port; 0 for any free port.
        purpose: What is served there, for errors.

    Raises:
        AddressInUseError: Another process has the port, even if it would share it.
    """
    keepers: list[socket.socket] = []
    try:
        for family, host in _tcp_addresses(addresses):
            keeper = socket.socket(family, socket.SOCK_STREAM)
            keepers.append(keeper)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                keeper.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            try:
                keeper.bind((host, port))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise
                keepers.pop().close()
                continue
            # only now: before, it would share the port with a server that shares it as well
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # nor with another keeper
            port = keeper.getsockname()[1]  # the others must have the same
    except OSError as error:
        for keeper in keepers:
            keeper.close()
        raise AddressInUseError(
            errno.EADDRINUSE, f"cannot listen for {purpose}: {error.strerror}", f"port {port}"
        ) from error
    return keepers


def _tcp_addresses(addresses: Iterable[str]) -> list[tuple[int, str]]:
    """Return the family and the address of each host, without duplicates."""
    matches = filter(None, map(_HOST_PORT.fullmatch, addresses))
    found = [
        (int(family), str(address[0]))
        for match in matches
        for family, _, _, _, address in socket.getaddrinfo(
            match["host"].strip("[]"), None, type=socket.SOCK_STREAM
        )
    ]
    return list(dict.fromkeys(found))


def _open_listener(family: int, host: str, port: int, *, shares_port: bool) -> socket.socket | None:
    """Return a listening socket; None if this machine does not have the address."""
    try:
        listener = socket.create_server(
            (host, port),
            family=family,
            backlog=_BACKLOG,
            reuse_port=shares_port,
            dualstack_ipv6=host == "::",
        )
    except OSError as error:
        if error.errno in _NO_SUCH_ADDRESS:
            return None
        raise
    listener.setblocking(False)
    return listener


def unix_socket_paths(addresses: Iterable[str]) -> list[str]:
    """Return the absolute paths of the addresses that are Unix sockets."""
    paths = (
        _canonical_path(_unix_path(address)) for address in addresses if address.startswith("unix:")
    )
    return [str(path.absolute()) for path in paths]


def _canonical_path(path: Path) -> Path:
    """Return the path of the same file from the root and without links, if gRPC can use that; else the path itself.

    Programs that clean up directories compare the files that they find with the paths under which sockets were bound,
    which the kernel lists. They remove a socket that was bound under another path, since they take it for dead.
    """
    resolved = path.parent.resolve() / path.name
    is_usable = is_valid_unix_path(resolved) and not NOT_IN_UNIX_PATHS & set(str(resolved))
    return resolved if is_usable else path


def _unix_path(address: str) -> Path:
    if has_authority(address):  # clients could not use it
        raise _unix_error("by a path that begins with / after unix://", address)
    path = Path(unix_path(address))
    if not path.name or not is_valid_unix_path(path):
        raise _unix_error(f"of 1 to {MAX_UNIX_PATH_BYTES} bytes", address)
    if NOT_IN_UNIX_PATHS.intersection(address):
        raise _unix_error(
            "without the letters %, ?, # and the comma (gRPC takes it for a URI)", address
        )
    return path


def _unix_error(allowed: str, address: str) -> InvalidArgumentError:
    message = f"--listen must name a Unix socket {allowed}, got {address!r}"
    return InvalidArgumentError(message, argument="listen")


def _bind_unix(server: PortBinder, path: Path, address: str, access: Access | None) -> None:
    with lock_path(path):
        remove_dead_socket(path)
        if access is None:
            _add_port(server, f"unix:{path}", address)
            return
        # gRPC listens as soon as it has bound the socket: nobody may open it before its owner and mode are set.
        former_mask = os.umask(_CLOSED_MASK)
        try:
            _add_port(server, f"unix:{path}", address)
        finally:
            os.umask(former_mask)
        try:
            access.apply_to(path)
        except OSError:
            path.unlink()
            raise


def _add_port(
    server: PortBinder, grpc_address: str, address: str, server_credentials: object = None
) -> int:
    try:
        if server_credentials is None:
            return server.add_insecure_port(grpc_address)
        return server.add_secure_port(grpc_address, server_credentials)
    except RuntimeError as error:  # grpcio gives no reason: it only logs one
        number = _bind_errno(grpc_address)
        if number is None and server_credentials is not None:
            raise InvalidArgumentError(
                "--tls-cert, --tls-key and --tls-client-ca must be PEM that gRPC takes, too, and it refuses them for "
                f"{address}: look for bytes in the files that are no text",
                argument="tls_cert",
            ) from error
        if number in (None, errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            raise AddressInUseError(
                errno.EADDRINUSE,
                "cannot listen there: the address is in use or not of this host",
                address,
            ) from error
        raise OSError(number, f"cannot listen there: {os.strerror(number)}", address) from error


def _bind_errno(grpc_address: str) -> int | None:
    """Bind an address once more, to learn why that fails: return the number of the error; None if it succeeds."""
    try:
        if grpc_address.startswith("unix:"):
            path = Path(unix_path(grpc_address))
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(os.fspath(path))
            path.unlink()
            return None
        host, _, port = grpc_address.rpartition(":")
        for family, kind, _, _, where in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as probe:
                probe.bind(where)
    except socket.gaierror:
        return None
    except OSError as error:
        return error.errno
    return None
