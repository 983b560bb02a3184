"""The command `deconvd-server`: it reads its options, then runs a daemon until a signal ends it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import deconvd
from deconvd.command_line import NamedPath, WholeNumber
from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd.host.malloc import keep_freed_memory
from deconvd_server.access_options import AccessPolicy, add_access_options, load_access_policy
from deconvd_server.command_options import ByteSize, Seconds, ServerCommand, unknown_variables
from deconvd_server.device import Device
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.exit_codes import ExitCode
from deconvd_server.exit_reasons import ExitReasons, ServingLostError, StoppedError
from deconvd_server.log_handler import LogHandler
from deconvd_server.log_options import add_log_options, log_to_standard_error
from deconvd_server.memory_options import add_memory_options
from deconvd_server.parent_watch import ParentWatch, start_parent_watch
from deconvd_server.process_options import add_process_options
from deconvd_server.residents import ResidentLimits
from deconvd_server.resources.budgets import budgets
from deconvd_server.resources.descriptors import DescriptorGuard, raise_limit
from deconvd_server.resources.systemd import Notifier, SystemdNotifier
from deconvd_server.settings import Settings
from deconvd_server.socket_options import add_socket_options, socket_access
from deconvd_server.stop_options import add_stop_options
from deconvd_server.token_command import token
from deconvd_server.transports.observers import AccessLog, CallLog, Observer
from deconvd_server.transports.tracing import CallTracer


def _exit_without(missing: ModuleNotFoundError) -> NoReturn:
    """Exit because a module is missing that the extra `server` installs."""
    if missing.name not in ("grpc_reflection", "prometheus_client", "threadpoolctl"):
        raise missing
    sys.exit(
        f"deconvd-server: {missing.name} is missing. Install deconvd with its extra `server`: "
        "from a checkout, pip install '.[server]'"
    )


try:
    from deconvd_server.address_lines import print_addresses
    from deconvd_server.device.opening import (
        DeviceSettings,
        check_device_name,
        open_devices,
        start_devices,
    )
    from deconvd_server.shutdown import Drainer, exit_process, run
    from deconvd_server.supervision.layout import WorkerPlace, describe_places
    from deconvd_server.supervision.orders import WorkerOrders
    from deconvd_server.supervision.process_choice import ProcessChoice, choose_processes
    from deconvd_server.supervision.worker_link import open_link
except ModuleNotFoundError as missing:
    _exit_without(missing)

if TYPE_CHECKING:
    from deconvd_server.daemon import Daemon

__all__ = ["main"]

_MAX_THREADS_COUNT = 1024

_log = logging.getLogger("deconvd_server")


def _device_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    try:
        check_device_name(name)
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error)) from None
    return name


class _WorkerCommand(ServerCommand):
    """The command of a process that a supervisor may have started: then it has its own values for some options."""

    def invoke(self, ctx: click.Context) -> Any:
        ctx.obj = WorkerOrders.take()
        if ctx.obj is not None:
            ctx.params.update(ctx.obj.options)
        return super().invoke(ctx)


@click.group(
    "deconvd-server",
    cls=_WorkerCommand,
    invoke_without_command=True,
    subcommand_metavar="[token ...]",
    context_settings={"show_default": True},
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    default=("127.0.0.1:50051",),
    metavar="ADDR",
    help="Where to listen: host:port (port 0 for any free port) or unix:///path. May be repeated; "
    "in the environment, separate addresses by spaces.",
)
@add_socket_options
@add_access_options
@click.option(
    "--direct-calls/--no-direct-calls",
    "takes_direct_calls",
    default=True,
    help="Whether deconvd's own clients may call without gRPC, which is faster.",
)
@click.option(
    "--direct-port",
    type=WholeNumber(0, 65535),
    default=0,
    show_default="any free port",
    help="The TCP port for direct calls, on the hosts that --listen names.",
)
@click.option(
    "--device",
    default="auto",
    metavar="cpu|cuda[:N][,...]|auto",
    callback=_device_name,
    help="The devices to compute on. cuda: every GPU; cuda:0,cuda:1: these; auto: every GPU, or the "
    "processor if there is no GPU.",
)
@add_process_options
@click.option(
    "--threads",
    type=WholeNumber(1, _MAX_THREADS_COUNT),
    default=None,
    show_default="the processors it may use",
    help="How many threads compute on the processor.",
)
@click.option(
    "--device-memory-bytes",
    type=ByteSize(min=1),
    default=None,
    show_default="nine tenths of a GPU's free memory; five sixteenths of the processor's",
    help="How much of each device's memory all calls together may take.",
)
@click.option(
    "--plan-store",
    type=NamedPath(file_okay=False, path_type=Path),
    default=None,
    show_default="none",
    help="Folder where GPU plans are stored, so that a restarted server is warm. If a server crashes while it tries "
    "cuDNN for a problem, that is stored there too, and the next server does not use cuDNN for that problem.",
)
@add_memory_options
@click.option(
    "--queue-wait-s",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    default=None,
    show_default="for others than deconvd's own client: as long as the call then takes at most three times as long as "
    "alone, and at least 0.03",
    help="How long a call may wait for others, whoever makes it. A call that would wait for longer, or until its "
    "deadline, is refused at once, and told when to come back.",
)
@add_stop_options
@click.option(
    "--parent",
    type=WholeNumber(min=1),
    default=None,
    metavar="PID",
    show_default="none",
    help="The process that starts the server. Once it has ended, the server drains as after SIGTERM, and removes the "
    "directories of its Unix sockets if they are empty.",
)
@add_log_options
@click.version_option(deconvd.__version__, prog_name="deconvd-server")
@click.pass_context
def main(
    context: click.Context,
    addresses: tuple[str, ...],
    socket_mode: int | None,
    socket_group: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    tokens: Path | None,
    is_insecure: bool,
    health_port: int | None,
    metrics_port: int | None,
    metrics_readers: tuple[str, ...],
    takes_direct_calls: bool,
    direct_port: int,
    device: str,
    processes: int | None,  # noqa: ARG001 - for the choice of processes, which has all options
    worker_port: int,  # noqa: ARG001 - for the supervisor, which has all options
    threads: int | None,
    device_memory_bytes: int | None,
    plan_store: Path | None,
    max_message_bytes: int | None,
    shared_memory_bytes: int | None,
    shared_memory_users: tuple[int, ...],
    resident_memory_bytes: int | None,
    spill_memory_bytes: int | None,
    tenant_bytes: int | None,
    session_lease_s: float,
    queue_wait_s: float | None,
    drain_timeout_s: float,
    drain_delay_s: float,
    device_timeout_s: float,
    parent: int | None,
    log_level: str,
    log_format: str,
    logs_access: bool,
) -> None:
    """Serve deconvolutions to deconvd's clients.

    The server prints a line for each address once it can serve. Each option can also be set in the
    environment, by DECONVD_ and its name in capitals: --direct-port by DECONVD_DIRECT_PORT,
    --no-direct-calls by DECONVD_DIRECT_CALLS=no. A SIZE is in bytes, or as in 512M (times 10^6)
    or 4Gi (times 2^30).

    Where a default is a part of the memory, that is the memory of the host, or the limit of the
    cgroup if that is less, as in a container. The same holds for processors. With several processes
    (--processes), that is for all together, and what is given as a number is, too, except for
    --max-message-bytes.

    Exit codes: 0 after a drain, 1 if the server cannot start, 2 if an option is wrong, 3 if the
    server must be restarted, 4 after a drain that cut calls short, 5 if a GPU hangs. README.md has
    them in a table.
    """
    if context.invoked_subcommand is not None:
        return
    orders: WorkerOrders | None = context.obj
    log_handler = log_to_standard_error(
        log_level, log_format, "" if orders is None else orders.name
    )
    if orders is None:  # or the supervisor has done so
        _warn_of_unknown_variables()
    try:
        policy = load_access_policy(
            addresses,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            tokens=tokens,
            is_insecure=is_insecure,
        )
        policy.check_readers(metrics_port, metrics_readers)
    except OSError as error:
        _exit_with_error(error)
    # a server that another process has started for itself is not what systemd watches
    systemd = SystemdNotifier(os.environ if parent is None and orders is None else {})
    reasons = ExitReasons(is_worker=orders is not None)
    watch = start_parent_watch(parent, addresses)
    why_one = ""
    if orders is None:
        choice = _choose_processes(context.params, reasons, watch)
        why_one = choice.reason
        if choice.places:
            _supervise(context.params, choice.places, policy, reasons, systemd, log_handler, watch)
    link = None if orders is None else open_link(orders, reasons)
    machine = budgets()
    keep_freed_memory(machine.pool_bytes)
    _start_descriptor_guard()
    drainer = Drainer(reasons)
    devices = DeviceSettings(
        threads,
        device_memory_bytes,
        plan_store,
        on_lost=reasons.put,
        card_parts_count=1 if orders is None else orders.card_parts_count,
        is_plan_store_lasting=orders is None or orders.is_plan_store_lasting,
    )
    if max_message_bytes is None:
        max_message_bytes = machine.largest_message_bytes
    if shared_memory_bytes is None:
        shared_memory_bytes = machine.shared_memory_bytes
    if spill_memory_bytes is None:
        spill_memory_bytes = machine.spill_bytes
    residents = ResidentLimits(
        resident_memory_bytes, spill_memory_bytes, tenant_bytes, lease_s=session_lease_s
    )
    tracer = CallTracer.find()
    observers: list[Observer] = [CallLog()]
    if tracer is not None:
        observers.append(tracer)
    if logs_access:
        observers.append(AccessLog())  # after the tracer: its lines have the traces
    settings = Settings(
        addresses,
        max_message_bytes,
        drain_timeout_s,
        shared_memory_bytes,
        shared_memory_users,
        residents,
        takes_direct_calls=takes_direct_calls,
        direct_port=direct_port,
        access=socket_access(socket_mode, socket_group, shared_memory_users),
        authenticator=policy.authenticator,
        tls=policy.tls,
        queue_wait_s=queue_wait_s,
        health_port=health_port,
        metrics_port=metrics_port,
        metrics_readers=metrics_readers,
        shares_ports=link is not None,
    )
    start_devices(device)
    daemon = _start(partial(_open_all, device, devices, why_one), settings, observers, reasons)
    _log.info("%s", daemon.description(policy.describe))
    notifier: Notifier = systemd
    if link is None:
        print_addresses(
            daemon.addresses,
            daemon.health_addresses,
            daemon.metrics_addresses,
            policy,
            metrics_readers,
        )
    else:
        notifier = link.notifier(daemon)
    notifier.notify_ready()
    run(
        daemon,
        reasons,
        drainer,
        drain_timeout_s,
        drain_delay_s=drain_delay_s,
        device_timeout_s=device_timeout_s,
        notifier=notifier,
        on_tick=log_handler.write_repeats,
        on_end=partial(_end, watch, tracer),
    )


def _choose_processes(
    options: dict[str, Any], reasons: ExitReasons, watch: ParentWatch | None
) -> ProcessChoice:
    try:
        return choose_processes(options, reasons)
    except StoppedError as stopped:
        _log.info("%s: ends before it has started", stopped)
        _end(watch, None, 0)
        exit_process(ExitCode.DRAINED)
    except (DeviceUnavailableError, DeconvdError) as error:
        _exit_with_error(error)


def _supervise(
    options: dict[str, Any],
    places: Sequence[WorkerPlace],
    policy: AccessPolicy,
    reasons: ExitReasons,
    systemd: SystemdNotifier,
    log_handler: LogHandler,
    watch: ParentWatch | None,
) -> NoReturn:
    """Serve with several processes, and exit."""
    from deconvd_server.supervision.supervise import supervise

    _log.info("%s", describe_places(places))
    try:
        code = supervise(options, places, policy, reasons, systemd, log_handler.write_repeats)
    except (DeviceUnavailableError, DeconvdError, OSError) as error:
        _exit_with_error(error)
    _end(watch, None, 0)
    exit_process(code)


def _start(
    open_all: Callable[[], Sequence[Device]],
    settings: Settings,
    observers: Sequence[Observer],
    reasons: ExitReasons,
) -> Daemon:
    """Return a daemon that serves with all devices; or exit.

    It listens before its devices are open: a client that finds nobody gives up after five seconds, and cards may take
    longer. But a worker is not to be called before it can serve, as others serve meanwhile: it opens its devices first,
    which warm up while the daemon is imported.
    """
    devices: Sequence[Device] = ()
    try:
        if settings.shares_ports:
            devices = open_all()
            open_all = partial(tuple, devices)
        from deconvd_server.daemon import Daemon

        daemon = Daemon(
            settings,
            observers=observers,
            on_lost=lambda what: reasons.put(ServingLostError(what)),
        )
    except (DeviceUnavailableError, DeconvdError, OSError, ModuleNotFoundError) as error:
        for device in devices:
            device.close()
        if isinstance(error, ModuleNotFoundError):
            _exit_without(error)
        _exit_with_error(error)
    try:
        daemon.serve(open_all)
    except (DeviceUnavailableError, DeconvdError, OSError) as error:
        daemon.drain()
        _exit_with_error(error)
    return daemon


def _open_all(name: str, settings: DeviceSettings, why_one: str) -> Sequence[Device]:
    """Open all devices in this process, and say why it is this one alone, unless an option says so."""
    devices = open_devices(name, settings)
    if why_one and len(devices) > 1:
        _log.info("one process serves all %d GPUs: %s", len(devices), why_one)
    return devices


def _end(watch: ParentWatch | None, tracer: CallTracer | None, timeout_s: float) -> None:
    """Do what is left to do when the server has stopped."""
    if watch is not None:
        watch.clean_up()
    if tracer is not None:
        tracer.flush(timeout_s)


def _start_descriptor_guard() -> None:
    try:
        raise_limit()
        guard = DescriptorGuard()
    except OSError as error:
        sys.exit(f"deconvd-server: {error.strerror}")
    guard.start()


def _warn_of_unknown_variables() -> None:
    if unknown := unknown_variables(os.environ, main.variables):
        _log.warning("environment variables that are not options: %s", ", ".join(unknown))


def _exit_with_error(error: Exception) -> NoReturn:
    """Exit with the reason why the server cannot start. The command itself reports a wrong option."""
    if isinstance(error, InvalidArgumentError):
        raise error
    sys.exit(f"deconvd-server: {error}")


main.add_command(token)


if __name__ == "__main__":
    main()
