"""The command `deconvd-server`: it reads its options, then runs a daemon until a signal reasons it."""

from __future__ import annotations

import grp
import logging
import os
import re
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

import deconvd
from deconvd.console import discard_output
from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd.host.malloc import keep_freed_memory
from deconvd_server.command_options import ByteSize, Seconds, ServerCommand, unknown_variables
from deconvd_server.device.faults import DeviceUnavailableError
from deconvd_server.exit_reasons import ExitReasons, ServingLostError
from deconvd_server.log_text import LogFormatter
from deconvd_server.residents import ResidentLimits
from deconvd_server.resources.budgets import LEAST_MESSAGE_BYTES, budgets
from deconvd_server.resources.descriptors import DescriptorGuard, raise_limit
from deconvd_server.resources.socket_file import Access
from deconvd_server.settings import Settings

try:
    from deconvd_server.daemon import Daemon
    from deconvd_server.device.opening import DeviceSettings, check_device_name, open_devices
    from deconvd_server.shutdown import Drainer, run
except ModuleNotFoundError as missing:
    if missing.name not in (
        "grpc_reflection",
        "threadpoolctl",
    ):  # the extra `server` installs these
        raise
    sys.exit(
        f"deconvd-server: {missing.name} is missing. Install deconvd with its extra `server`: "
        "from a checkout, pip install '.[server]'"
    )

__all__ = ["main"]

_GRPC_MAX_MESSAGE_BYTES = 2**31 - 1
"""gRPC holds the limit in a signed 32-bit integer."""

_MAX_THREADS_COUNT = 1024

_USER_ID = re.compile(r"[0-9]{1,10}")
_LAST_ID = 2**32 - 2
"""The largest user or group id: the system uses the next one, -1, for "no change"."""

_FILE_MODE = re.compile(r"0?[0-7]{3}")
_GROUP_MODE = 0o660
_WORLD_MODE = 0o666

_log = logging.getLogger("deconvd_server")


def _device_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    try:
        check_device_name(name)
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error)) from None
    return name


def _user_ids(
    _context: click.Context, _parameter: click.Parameter, ids: str | None
) -> tuple[int, ...]:
    given = [] if not ids else ids.split(",")
    if not all(_USER_ID.fullmatch(one) and int(one) <= _LAST_ID for one in given):
        raise click.BadParameter(
            f"{ids!r} is not a list of user ids up to {_LAST_ID}, as in 1000,1001"
        )
    return tuple(map(int, given))


def _file_mode(
    _context: click.Context, _parameter: click.Parameter, mode: str | None
) -> int | None:
    if not mode:
        return None
    if not _FILE_MODE.fullmatch(mode):
        raise click.BadParameter(f"{mode!r} is not a file mode in octal digits, as in 0660")
    return int(mode, 8)


def _group_id(
    _context: click.Context, _parameter: click.Parameter, group: str | None
) -> int | None:
    if not group:
        return None
    if _USER_ID.fullmatch(group) and int(group) <= _LAST_ID:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {group!r}") from None


@click.command("deconvd-server", cls=ServerCommand, context_settings={"show_default": True})
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    default=("127.0.0.1:50051",),
    metavar="ADDR",
    help="Where to listen: host:port (port 0 for any free port) or unix:///path. May be repeated; "
    "in the environment, separate addresses by spaces.",
)
@click.option(
    "--socket-mode",
    default=None,
    metavar="MODE",
    callback=_file_mode,
    show_default="0660 with --socket-group, 0666 with --shared-memory-users, else what the umask leaves",
    help="Permissions of the Unix sockets, in octal digits: users who may write to a socket may call the server.",
)
@click.option(
    "--socket-group",
    default=None,
    metavar="GROUP",
    callback=_group_id,
    show_default="the one that the system gives new files",
    help="The group of the Unix sockets: a name or a number.",
)
@click.option(
    "--direct-calls/--no-direct-calls",
    "takes_direct_calls",
    default=True,
    help="Whether deconvd's own clients may call without gRPC, which is faster.",
)
@click.option(
    "--direct-port",
    type=click.IntRange(0, 65535),
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
@click.option(
    "--threads",
    type=click.IntRange(1, _MAX_THREADS_COUNT),
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
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    show_default="none",
    help="Folder where GPU plans are stored, so that a restarted server is warm. If a server crashes while it tries "
    "cuDNN for a problem, that is stored there too, and the next server does not use cuDNN for that problem.",
)
@click.option(
    "--max-message-bytes",
    type=ByteSize(LEAST_MESSAGE_BYTES, _GRPC_MAX_MESSAGE_BYTES),
    default=None,
    show_default="1 GiB, or an eighth of the memory if that is less",
    help="The largest request and the largest response.",
)
@click.option(
    "--shared-memory-bytes",
    type=ByteSize(min=0),
    default=None,
    show_default="a quarter of the memory",
    help="How much memory all clients on this host together may borrow to pass tensors in; 0 to lend none.",
)
@click.option(
    "--shared-memory-users",
    default=None,
    metavar="ID[,...]",
    callback=_user_ids,
    show_default="none",
    help="Ids of the users who may borrow that memory, in addition to the server's own user and root. Any user may "
    "then call, unless --socket-mode or --socket-group restricts that.",
)
@click.option(
    "--resident-memory-bytes",
    type=ByteSize(min=0),
    default=None,
    show_default="a quarter of what calls may take",
    help="How much of each device's memory resident tensors may take; 0 to keep none.",
)
@click.option(
    "--spill-memory-bytes",
    type=ByteSize(min=0),
    default=None,
    show_default="an eighth of the memory",
    help="How much of the host's memory resident tensors may take when a GPU has no room for them.",
)
@click.option(
    "--tenant-bytes",
    type=ByteSize(min=0),
    default=None,
    show_default="no quota: the least recently used are evicted",
    help="How much memory the residents of one tenant may take. A tenant is all clients that send the same secret, or "
    "else one connection.",
)
@click.option(
    "--session-lease-s",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    default=30.0,
    help="How long residents are kept for a client that sends no heartbeat.",
)
@click.option(
    "--drain-timeout-s",
    type=Seconds(min=0),
    metavar="SECONDS",
    default=30.0,
    help="How long calls under way may take to end after SIGTERM or SIGINT. The process reasons at most two seconds "
    "later, and at once at a second signal.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="The least severe messages to log, on standard error.",
)
@click.version_option(deconvd.__version__, prog_name="deconvd-server")
def main(
    addresses: tuple[str, ...],
    socket_mode: int | None,
    socket_group: int | None,
    takes_direct_calls: bool,
    direct_port: int,
    device: str,
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
    drain_timeout_s: float,
    log_level: str,
) -> None:
    """Serve deconvolutions to deconvd's clients.

    The server prints a line for each address once it can serve. Each option can also be set in the
    environment, by DECONVD_ and its name in capitals: --direct-port by DECONVD_DIRECT_PORT,
    --no-direct-calls by DECONVD_DIRECT_CALLS=no. A SIZE is in bytes, or as in 512M (times 10^6)
    or 4Gi (times 2^30).

    Where a default is a part of the memory, that is the memory of the host, or the limit of the
    cgroup if that is less, as in a container. The same holds for processors.

    Exit codes: 0 after a drain, 1 if the server cannot start, 2 if an option is wrong, 3 if the
    server must be restarted, 4 after a drain that cut calls short. README.md has them in a table.
    """
    _log_to_standard_error(log_level)
    _warn_of_unknown_variables()
    machine = budgets()
    keep_freed_memory(machine.pool_bytes)
    _start_descriptor_guard()
    reasons = ExitReasons()
    drainer = Drainer(reasons)
    devices = DeviceSettings(threads, device_memory_bytes, plan_store, on_lost=reasons.put)
    if max_message_bytes is None:
        max_message_bytes = machine.largest_message_bytes
    if shared_memory_bytes is None:
        shared_memory_bytes = machine.shared_memory_bytes
    if spill_memory_bytes is None:
        spill_memory_bytes = machine.spill_bytes
    residents = ResidentLimits(
        resident_memory_bytes, spill_memory_bytes, tenant_bytes, lease_s=session_lease_s
    )
    try:
        daemon = Daemon(
            Settings(
                addresses,
                max_message_bytes,
                drain_timeout_s,
                shared_memory_bytes,
                shared_memory_users,
                residents,
                takes_direct_calls=takes_direct_calls,
                direct_port=direct_port,
                access=_socket_access(socket_mode, socket_group, shared_memory_users),
            ),
            on_lost=lambda what: reasons.put(ServingLostError(what)),
        )
    except (OSError, DeconvdError) as error:
        _exit_with_error(error)
    try:
        daemon.serve(partial(open_devices, device, devices))
    except (DeviceUnavailableError, DeconvdError, OSError) as error:
        daemon.drain()
        _exit_with_error(error)
    _print_addresses(daemon.addresses)
    run(daemon, reasons, drainer, drain_timeout_s)


def _start_descriptor_guard() -> None:
    try:
        raise_limit()
        guard = DescriptorGuard()
    except OSError as error:
        sys.exit(f"deconvd-server: {error.strerror}")
    guard.start()


def _socket_access(mode: int | None, group: int | None, users: Collection[int]) -> Access | None:
    """Return who may open the Unix sockets; None to leave that to the umask."""
    if mode is None:
        if group is None and not users:
            return None
        mode = _WORLD_MODE if group is None else _GROUP_MODE
    return Access(mode, group)


def _log_to_standard_error(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _print_addresses(addresses: Sequence[str]) -> None:
    """Print where the server listens. If that fails, the server serves all the same."""
    try:
        for address in addresses:
            print(f"deconvd-server: listening on {address}", flush=True)
    except OSError as error:
        _log.warning("cannot print the addresses to standard output: %s", error.strerror)
        discard_output()


def _warn_of_unknown_variables() -> None:
    if unknown := unknown_variables(os.environ, main.variables):
        _log.warning("environment variables that are not options: %s", ", ".join(unknown))


def _exit_with_error(error: Exception) -> NoReturn:
    """Exit with the reason why the server cannot start. The command itself reports a wrong option."""
    if isinstance(error, InvalidArgumentError):
        raise error
    sys.exit(f"deconvd-server: {error}")


if __name__ == "__main__":
    main()
