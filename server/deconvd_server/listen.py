"""Addresses to listen on, and the care that a Unix socket's file needs."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc

from deconvd.errors import InvalidArgumentError
from deconvd.transport import unix_path

__all__ = ["AddressInUseError", "bind", "listen_beside", "release", "unix_sockets"]

_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/]+):(?P<port>\d+)")
_MAX_UNIX_PATH_BYTES = 107  # sun_path of sockaddr_un(7), less the final zero
_BACKLOG = 64
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_NOT_IN_GRPC_PATHS = frozenset("%?#")


class AddressInUseError(OSError):
    """Another process listens on the address, or its file is not a socket."""


def bind(server: grpc.Server, address: str) -> str:
    """Make `server` listen on an address, and return the address with the port that it got.

    Args:
        address: ``host:port``, where port 0 stands for any free one; ``unix:path`` or
            ``unix:///path``. The file that a dead server left at the path is replaced.

    Raises:
        InvalidArgumentError: It is no such address.
        AddressInUseError: Another process has it.
    """
    try:
        address.encode()
    except UnicodeEncodeError:  # gRPC's names are UTF-8
        raise InvalidArgumentError(
            f"--listen must be a name in UTF-8, got {address!r}", argument="listen"
        ) from None
    if address.startswith("unix:"):
        path = _unix_path(address)
        if not path.parent.is_dir():
            raise _unix_error("in a directory that exists", address)
        with _locked(path.parent):
            _remove_dead_socket(path)
            _add_port(server, f"unix:{path}", address)
        return address
    match = _HOST_PORT.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise InvalidArgumentError(
            f"--listen must be host:port or unix:path, got {address!r}", argument="listen"
        )
    port = _add_port(server, address, address)
    return f"{match['host']}:{port}"


def release(address: str) -> None:
    """Remove what `bind` left of an address, once its server has stopped."""
    if address.startswith("unix:"):
        path = _unix_path(address)
        # A successor may listen by now, and the directory may have gone with all that was in it.
        with suppress(AddressInUseError, FileNotFoundError), _locked(path.parent):
            _remove_dead_socket(path)


def listen_beside(addresses: Iterable[str], port: int) -> list[socket.socket]:
    """Return sockets that listen on one TCP port of the hosts of `addresses`; none if they have none.

    Args:
        addresses: As `bind` has returned them.
        port: 0 for any free one.

    Raises:
        AddressInUseError: Another process has the port.
    """
    listeners: list[socket.socket] = []
    try:
        for family, host in _tcp_addresses(addresses):
            listener = _listener(family, host, port)
            if listener is not None:
                listeners.append(listener)
                port = listener.getsockname()[1]  # the same on all
    except OSError as error:
        for listener in listeners:
            listener.close()
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)  # getaddrinfo's are negative
        raise AddressInUseError(
            errno.EADDRINUSE, f"cannot listen for direct calls: {reason}", f"port {port}"
        ) from error
    return listeners


def _tcp_addresses(addresses: Iterable[str]) -> list[tuple[int, str]]:
    """Return the family and the IP address of each host, once."""
    matches = filter(None, map(_HOST_PORT.fullmatch, addresses))
    found = [
        (int(family), str(address[0]))
        for match in matches
        for family, _, _, _, address in socket.getaddrinfo(
            match["host"].strip("[]"), None, type=socket.SOCK_STREAM
        )
    ]
    return list(dict.fromkeys(found))


def _listener(family: int, host: str, port: int) -> socket.socket | None:
    """Return a socket that listens; None if this host has no such address."""
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        if error.errno in _NO_SUCH_ADDRESS:
            return None
        raise
    listener.setblocking(False)
    return listener


def unix_sockets(addresses: Iterable[str]) -> list[str]:
    """Return the absolute paths of those addresses that are Unix sockets."""
    return [str(_unix_path(a).absolute()) for a in addresses if a.startswith("unix:")]


def _unix_path(address: str) -> Path:
    path = Path(unix_path(address))
    if not path.name or len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
        raise _unix_error(f"of 1 to {_MAX_UNIX_PATH_BYTES} bytes", address)
    if _NOT_IN_GRPC_PATHS.intersection(address):
        raise _unix_error("without the letters %, ? and # (gRPC takes it for a URI)", address)
    return path


def _unix_error(allowed: str, address: str) -> InvalidArgumentError:
    message = f"--listen must name a Unix socket {allowed}, got {address!r}"
    return InvalidArgumentError(message, argument="listen")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other servers from sockets in `directory` for the block.

    Of two that start at once on one socket, the second then finds the first alive. The lock is on
    the directory itself, so no file is left behind.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_socket(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise AddressInUseError(errno.EADDRINUSE, "the file is not a socket", str(path))
    if _is_listening(path):
        raise AddressInUseError(errno.EADDRINUSE, "a live server listens there", str(path))
    path.unlink()


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        return True


def _add_port(server: grpc.Server, grpc_address: str, address: str) -> int:
    try:
        return server.add_insecure_port(grpc_address)
    except RuntimeError as error:  # all that grpcio says; its log has the reason
        raise AddressInUseError(
            errno.EADDRINUSE,
            "cannot listen there: the address is in use or not of this host",
            address,
        ) from error
