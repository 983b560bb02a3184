"""The function `connect`: from its options to a `Connection`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from deconvd_client.connect_options import target_from_environment
from deconvd_client.connection import Connection
from deconvd_client.credentials import Tls
from deconvd_client.transports.grpc.channel import MAX_MESSAGE_BYTES
from deconvd_client.transports.route import TransportName

__all__ = ["connect"]

_MAX_CONCURRENT_CALLS: Final = 16
"""How many calls `Connection.submit` makes at the same time: enough for links of 50 ms, and few threads."""


def connect(
    target: str | Sequence[str] | None = None,
    *,
    timeout_s: float = 60.0,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    transport: str = TransportName.AUTO,
    tenant_key: str | bytes | None = None,
    fail_fast: bool = False,
    max_concurrent_calls: int = _MAX_CONCURRENT_CALLS,
    tls: Tls | bool | None = None,
    token: str | os.PathLike[str] | None = None,
) -> Connection:
    """Return a connection to a server. Nothing is sent before the first call.

    Args:
        target: Address of the server: ``host:port`` or ``unix:path``. Or several servers: a list of addresses, a string
            of them with commas between, ``dns:///name:port`` for all addresses of a name, or ``proxy:///host:port`` for
            a proxy with several servers behind it, which must hash the header ``deconvd-affinity``. None, the default,
            means the value of DECONVD_TARGET in the environment.
        timeout_s: How long each call may take, in seconds, including its retries. It must be positive.
            Values above a million (eleven days) are taken as a million.
        max_message_bytes: Size of the largest response message to accept, in bytes, up to 2^31 - 1. Results of
            more than 4 MiB come as a stream of smaller messages.
        transport: How tensors get to the server:

            - ``auto``: the fastest transport that works. On the server's host that is shared memory and
              its Unix socket, elsewhere TCP.
            - ``shared_memory``: tensors from 32 KiB on go through shared memory.
            - ``unix``: everything goes through the server's Unix socket, on the same host.
            - ``tcp``: everything goes over TCP. The target must be ``host:port``.
            - ``grpc``: everything goes through gRPC to the target, and no other kind of connection is made. Use it
              if a proxy is in between. If the server has several processes, gRPC also goes to their own addresses,
              where these can be reached.

            Except for ``auto``, calls fail with UnavailableError or ExhaustedError if that transport does not
            work. ``proxy:///`` takes ``auto`` and ``grpc`` alone.
        tenant_key: A secret of up to 64 bytes. Connections with the same key share one quota for the
            tensors that the server keeps. If one has sent a tensor, the others do not send it again. None,
            the default, means the value of DECONVD_TENANT_KEY in the environment. If that is not set, or the
            key is empty, the connection shares nothing. For a server that knows its callers, connections share
            only with those of their own identity, and without a key they share with all of these.
        fail_fast: Whether a call fails at once if the server cannot be reached. Otherwise it tries again:
            until its timeout if the server was reached before (it may be restarting), and for 5 seconds if
            it never was.
        max_concurrent_calls: How many calls of `Connection.submit`, or of `deconvd_client.aio`, run at the same time.
            Others wait for their turn.
        tls: Whether connections by TCP are encrypted, and whom they trust. Unix sockets never have TLS.

            - None, the default: with TLS if the environment sets DECONVD_TLS_CA, a file with the certificates of
              those who may sign the server's, or DECONVD_CLIENT_CERT and DECONVD_CLIENT_KEY, the files with the
              client's own certificate and its key. Else without TLS.
            - True: with TLS, and with the authorities that the system trusts.
            - A `Tls`: with TLS, and with the files that it names.
            - False: without TLS, and the token may travel in plain text, over a network that you trust.
        token: The secret that tells the server who calls: a str, or a path of a file that has it, which is read again
            when it changes. None, the default, means DECONVD_TOKEN in the environment, else the file that
            DECONVD_TOKEN_FILE names, else no token.

    Raises:
        InvalidArgumentError: An argument has a wrong type or is out of its range (a ValueError), a file cannot be
            used, or a token would travel to another host without TLS.
    """
    return Connection(
        target_from_environment() if target is None else target,
        timeout_s=timeout_s,
        max_message_bytes=max_message_bytes,
        transport=transport,
        tenant_key=tenant_key,
        fail_fast=fail_fast,
        max_concurrent_calls=max_concurrent_calls,
        tls=tls,
        token=token,
    )
