"""Where a worker may be found, from what the server names and how the server was reached."""

from __future__ import annotations

import os

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd_client.credentials import Credentials
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.side_sockets import Owners, find_worker_sockets
from deconvd_client.transports.targets import host_of, port_of, with_port

__all__ = ["is_shared", "worker_targets"]


def is_shared(target: str, info: pb.GetServerInfoResponse) -> bool:
    """Return whether several workers answer at a target, and not one alone: then its caller wants that one.

    Args:
        info: What the server has answered there.
    """
    name = os.path.basename(unix_path(target))
    own = [worker for worker in info.workers if worker.name == info.worker_name]
    names = [os.path.basename(path) for worker in own for path in worker.unix_sockets]
    ports = [worker.grpc_port for worker in own]
    return len(info.workers) > 1 and (name not in names if name else port_of(target) not in ports)


def worker_targets(
    worker: pb.Worker,
    target: str,
    transport: TransportName,
    credentials: Credentials,
    owners: Owners,
) -> list[str]:
    """Return the targets by which a worker may be reached, the nearest first.

    The host is always the one that the caller has given. A token goes to a port of it only by TLS: there the
    certificate tells who listens, before the token is sent.

    Args:
        worker: As the server names it.
        target: By which the server was reached.
        transport: How tensors may travel.
        credentials: What the client would show of itself.
        owners: Whose Unix sockets are used.
    """
    path = unix_path(target)
    sockets = [f"unix:{found}" for found in find_worker_sockets(worker, path, owners)]
    if path:
        return sockets
    targets = [] if transport in (TransportName.TCP, TransportName.GRPC) else sockets
    is_far_allowed = transport is not TransportName.UNIX and host_of(target)
    if worker.grpc_port and is_far_allowed and (credentials.tls or not credentials.token()):
        targets = [*targets, with_port(target, worker.grpc_port)]
    return targets
