"""The command `deconvd-server`: reads its options, then runs a daemon until a signal ends it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

import click

import deconvd
from deconvd.errors import DeconvdError
from deconvd_server.daemon import Daemon, Settings
from deconvd_server.device import Device
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.listen import AddressInUseError

__all__ = ["main"]

_GIBIBYTE = 1 << 30
_GRPC_MAX_MESSAGE_BYTES = 2**31 - 1

_log = logging.getLogger("deconvd_server")


@click.command(context_settings={"auto_envvar_prefix": "DECONVD", "show_default": True})
@click.option(
    "--listen",
    "addresses",
    envvar="DECONVD_LISTEN",
    multiple=True,
    default=("127.0.0.1:50051",),
    metavar="ADDR",
    help="Where to listen: host:port (port 0 for any free one) or unix:///path. May be repeated; "
    "in the environment, separated by spaces.",
)
@click.option(
    "--device",
    "device_name",
    envvar="DECONVD_DEVICE",
    default="auto",
    metavar="cpu|cuda[:N]|auto",
    help="What to compute on. auto: a GPU if there is one, else the processor.",
)
@click.option(
    "--threads",
    envvar="DECONVD_THREADS",
    type=click.IntRange(min=1),
    default=None,
    show_default="the processors it may use",
    help="Threads that compute on the processor.",
)
@click.option(
    "--max-message-bytes",
    envvar="DECONVD_MAX_MESSAGE_BYTES",
    type=click.IntRange(1024, _GRPC_MAX_MESSAGE_BYTES),
    default=_GIBIBYTE,
    help="The largest request and the largest response.",
)
@click.option(
    "--drain-timeout-s",
    envvar="DECONVD_DRAIN_TIMEOUT_S",
    type=click.FloatRange(min=0),
    default=30.0,
    help="How long calls under way may take to end after SIGTERM or SIGINT. A second signal cuts it short.",
)
@click.option(
    "--log-level",
    envvar="DECONVD_LOG_LEVEL",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="The least severe messages to log, on standard error.",
)
@click.version_option(deconvd.__version__, prog_name="deconvd-server")
def main(
    addresses: tuple[str, ...],
    device_name: str,
    threads: int | None,
    max_message_bytes: int,
    drain_timeout_s: float,
    log_level: str,
) -> None:
    """Serve deconvolutions to deconvd's clients.

    Prints a line for each address once it can serve. Each option can be given in the environment
    too, as DECONVD_ and its name in capitals.

    Exits with 0 after a drain, 1 if it cannot start, 2 if an option is wrong.
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    open_device = _device_opener(device_name, threads)
    settings = Settings(addresses, max_message_bytes, drain_timeout_s)
    signals = _signals()
    try:
        daemon = Daemon(settings)
    except (AddressInUseError, DeconvdError) as error:
        sys.exit(f"deconvd-server: {error}")
    try:
        daemon.serve(open_device)
    except DeconvdError as error:
        daemon.drain()
        sys.exit(f"deconvd-server: {error}")
    for address in daemon.addresses:
        print(f"deconvd-server: listening on {address}", flush=True)
    _drain_on_signal(daemon, signals)


def _device_opener(name: str, threads: int | None) -> Callable[[], Device]:
    if name in ("cpu", "auto"):
        return lambda: CpuDevice(threads)
    raise click.BadParameter(f"{name!r} is not cpu, cuda, cuda:N or auto", param_hint="--device")


def _signals() -> SimpleQueue[int | None]:
    """Return a queue that SIGTERM and SIGINT are put into from now on."""
    signals: SimpleQueue[int | None] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.put(number))
    return signals


def _drain_on_signal(daemon: Daemon, signals: SimpleQueue[int | None]) -> None:
    """Wait for a signal, then drain; cut the drain short at the next."""
    number = signals.get()
    _log.info("%s: draining", signal.Signals(number).name if number else "stop")
    drainer = threading.Thread(target=_drain, args=(daemon, signals))
    drainer.start()
    while signals.get() is not None:
        daemon.cut_drain()
    drainer.join()


def _drain(daemon: Daemon, signals: SimpleQueue[int | None]) -> None:
    try:
        daemon.drain()
    finally:
        signals.put(None)


if __name__ == "__main__":
    main()
