"""A process as one of several that serve as one: its name, its link to the supervisor, and its metrics."""

from __future__ import annotations

import socket

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.daemon import Daemon
from deconvd_server.exit_reasons import ExitReasons
from deconvd_server.resources.systemd import Notifier
from deconvd_server.resources.worker_table import WORKERS
from deconvd_server.supervision.link import LinkNotifier, start_link_thread
from deconvd_server.supervision.orders import WorkerOrders

__all__ = ["WorkerLink", "open_link"]


class WorkerLink:
    """What a worker has that a server alone has not."""

    def __init__(self, orders: WorkerOrders, link: socket.socket) -> None:
        self._orders = orders
        self._link = link

    def notifier(self, daemon: Daemon) -> Notifier:
        """Return what tells the supervisor how a daemon is, which serves. Answer the supervisor from now on."""
        if self._orders.metrics is not None:
            # not above: it takes 20 ms, and most servers have no metrics
            from deconvd_server.supervision.metrics_channel import start_metrics_thread

            start_metrics_thread(self._orders.metrics, daemon.metrics_view().collector_for)

        def describe() -> pb.Worker:
            assert daemon.backend is not None
            return daemon.backend.worker()

        return LinkNotifier(self._link, self._orders.watchdog_s, describe)


def open_link(orders: WorkerOrders, reasons: ExitReasons) -> WorkerLink:
    """Become the worker that the orders say, and do what the supervisor says from now on. It begins a thread."""
    WORKERS.name = orders.name
    link = socket.socket(fileno=orders.link)
    start_link_thread(link, reasons)
    return WorkerLink(orders, link)
