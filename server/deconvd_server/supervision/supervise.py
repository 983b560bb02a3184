"""Runs the command `deconvd-server` with several processes: what the supervisor needs before its workers start."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from socket import socket
from typing import Any, Final

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.access_options import AccessPolicy
from deconvd_server.address_lines import print_addresses
from deconvd_server.exit_codes import ExitCode
from deconvd_server.exit_reasons import ExitReasons, ServingLostError
from deconvd_server.resources.shared_quotas import SharedQuotas, create_shared_quotas
from deconvd_server.resources.systemd import SystemdNotifier
from deconvd_server.supervision.layout import (
    WorkerPlace,
    own_addresses,
    own_options,
    tcp_addresses,
)
from deconvd_server.supervision.plans_folder import PlansFolder, temporary_plans_folder
from deconvd_server.supervision.shared_path import SharedPath
from deconvd_server.supervision.supervisor import Supervisor
from deconvd_server.supervision.worker import Worker
from deconvd_server.transports.grpc.health import Health
from deconvd_server.transports.grpc.health_server import HealthServer
from deconvd_server.transports.listen import host_of, listen_tcp, reserve_port, side_hosts

__all__ = ["supervise"]

_HUNG_S: Final = 30.0
"""How long a worker may be silent before it is killed, if systemd's watchdog says nothing else."""

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

_log = logging.getLogger("deconvd_server")


def supervise(
    options: Mapping[str, Any],
    places: Sequence[WorkerPlace],
    policy: AccessPolicy,
    reasons: ExitReasons,
    notifier: SystemdNotifier,
    on_tick: Callable[[], None],
) -> ExitCode:
    """Run workers until a reason comes to end, and return what to exit with.

    Args:
        options: The values of all options of the command, by the names of the parameters.
        places: The workers. Their ports and paths have been checked: see `check_layout`.
        policy: Who may call.
        reasons: Has the signals.
        notifier: Tells systemd what it wants to know.
        on_tick: Called about once a second.

    Raises:
        InvalidArgumentError: An option is not possible with so many processes.
        AddressInUseError: Another process has an address or a port.
        OSError: An address is refused for another reason.
    """
    with ExitStack() as stack:
        keeper = _PortKeeper(stack)
        addresses = [keeper.keep(address) for address in options["addresses"]]
        unix = [address for address in addresses if host_of(address) is None]
        paths = [stack.enter_context(_shared_path(address)) for address in unix]
        plans = None
        if options["plan_store"] is None and any(place.device != "cpu" for place in places):
            plans = stack.enter_context(temporary_plans_folder())
        quotas = None
        if options["tenant_bytes"] is not None:
            quotas = create_shared_quotas(len(places))
            stack.callback(os.close, quotas)
        workers = [
            _make_worker(
                place,
                number,
                addresses,
                keeper,
                options,
                plans,
                quotas,
                len(places),
                notifier,
            )
            for number, place in enumerate(places)
        ]
        health = Health(_SERVICE.full_name)
        health_addresses = _serve_health(stack, health, addresses, options, reasons)
        metrics_addresses = _serve_metrics(stack, health, addresses, options, policy, workers)

        def announce() -> None:
            _log.info("%d processes serve as one, on %s", len(places), ", ".join(addresses))
            print_addresses(
                addresses, health_addresses, metrics_addresses, policy, options["metrics_readers"]
            )

        supervisor = Supervisor(
            workers,
            paths,
            None if quotas is None else SharedQuotas(quotas),
            health,
            reasons,
            notifier,
            on_ready=announce,
            on_tick=on_tick,
            drain_s=options["drain_delay_s"] + options["drain_timeout_s"],
        )
        stack.callback(supervisor.kill_all)
        return supervisor.run()


class _PortKeeper:
    """Keeps TCP ports for the workers, also while none of them listens there."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def keep(self, address: str) -> str:
        """Keep the port of an address to listen on, and return the address with it. Unix addresses need none."""
        host = host_of(address)
        if host is None:
            return address
        port = int(address.rpartition(":")[2])
        return f"{host}:{self.keep_port([address], port, 'calls')}"

    def keep_port(self, addresses: Sequence[str], port: int, purpose: str) -> int:
        """Keep a port on the hosts of some addresses, and return it; 0 if there is no host."""
        keepers: list[socket] = reserve_port(addresses, port, purpose)
        for keeper in keepers:
            self._stack.enter_context(keeper)
        return int(keepers[0].getsockname()[1]) if keepers else 0


def _make_worker(
    place: WorkerPlace,
    number: int,
    addresses: Sequence[str],
    keeper: _PortKeeper,
    options: Mapping[str, Any],
    plans: PlansFolder | None,
    quotas: int | None,
    workers_count: int,
    notifier: SystemdNotifier,
) -> Worker:
    tcp = tcp_addresses(addresses)
    hosts = [f"{host}:0" for host in side_hosts(tcp)] if tcp else []
    first = options["worker_port"]
    grpc_port = keeper.keep_port(hosts, first and first + number, "calls of one process")
    direct_port = 0
    if options["takes_direct_calls"]:
        first = options["direct_port"]
        direct_port = keeper.keep_port(tcp, first and first + number, "direct calls")
    own = own_options(options, place, workers_count)
    own["addresses"] = [*tcp, *own_addresses(addresses, place.name, grpc_port)]
    own["direct_port"] = direct_port
    own["plan_store"] = options["plan_store"] if plans is None else plans.path
    is_watched = notifier.watchdog_s < math.inf
    return Worker(
        place,
        grpc_port,
        own,
        plans,
        quotas,
        has_metrics=options["metrics_port"] is not None,
        watchdog_s=notifier.watchdog_s if is_watched else _HUNG_S,
        drain_s=options["drain_delay_s"] + options["drain_timeout_s"],
        workers_count=workers_count,
    )


def _serve_health(
    stack: ExitStack,
    health: Health,
    addresses: Sequence[str],
    options: Mapping[str, Any],
    reasons: ExitReasons,
) -> list[str]:
    """Serve health alone, if an option says so, and return where."""
    if options["health_port"] is None:
        return []
    server = HealthServer(
        health,
        addresses,
        options["health_port"],
        lambda: reasons.put(ServingLostError("the thread of the health port")),
    )
    stack.callback(server.stop)
    return server.addresses


def _serve_metrics(
    stack: ExitStack,
    health: Health,
    addresses: Sequence[str],
    options: Mapping[str, Any],
    policy: AccessPolicy,
    workers: Sequence[Worker],
) -> list[str]:
    """Serve metrics, if an option says so, and return where."""
    if options["metrics_port"] is None:
        return []
    # not above: it takes 20 ms, and most servers have no metrics
    from deconvd_server.metrics.server import MetricsServer
    from deconvd_server.supervision.merged_metrics import MergedMetrics, supervisor_metrics

    metrics = MergedMetrics(
        lambda: [channel for worker in workers if (channel := worker.metrics) is not None],
        partial(supervisor_metrics, health, workers),
        options["metrics_readers"],
    )
    listeners = listen_tcp(
        [f"{host}:0" for host in side_hosts(addresses)],
        options["metrics_port"],
        "metrics (--metrics-port)",
    )
    server = MetricsServer(listeners, policy.authenticator, policy.tls, metrics.collector_for)
    stack.callback(server.stop)
    return server.addresses


@contextmanager
def _shared_path(address: str) -> Iterator[SharedPath]:
    path = SharedPath(address)
    try:
        yield path
    finally:
        path.remove()
