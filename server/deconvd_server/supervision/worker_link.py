"""A process as one of several that serve as one: its name, its link to the supervisor, and its metrics."""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING

from deconvd_server.exit_reasons import ExitReasons
from deconvd_server.resources.shared_quotas import QUOTA_SHARING, SharedQuotas
from deconvd_server.resources.systemd import Notifier
from deconvd_server.resources.worker_table import WORKERS
from deconvd_server.supervision.home_requests import HomeRequests
from deconvd_server.supervision.link import LinkNotifier, start_link_thread
from deconvd_server.supervision.orders import WorkerOrders
from deconvd_server.supervision.room_requests import RoomRequests

if TYPE_CHECKING:  # it takes long to import, and a worker is linked before
    from deconvd_server.daemon import Daemon

__all__ = ["WorkerLink", "open_link"]


class WorkerLink:
    """What a worker has that a server alone has not. It begins a thread, which does what the supervisor says."""

    def __init__(self, orders: WorkerOrders, reasons: ExitReasons) -> None:
        self._orders = orders
        self._link = socket.socket(fileno=orders.link)
        self._homes = HomeRequests()
        self._rooms: RoomRequests | None = None
        if orders.quotas is not None:
            QUOTA_SHARING.quotas = SharedQuotas(orders.quotas, int(orders.name))
            os.close(orders.quotas)
            self._rooms = RoomRequests(QUOTA_SHARING.quotas)
            QUOTA_SHARING.start_serving = self._rooms.start_serving
        start_link_thread(self._link, reasons, self._homes.note_answer, self._note_room_request)

    def notifier(self, daemon: Daemon) -> Notifier:
        """Return what tells the supervisor how a daemon is, which serves. Answer the supervisor from now on."""
        if self._orders.metrics is not None:
            # not above: it takes 20 ms, and most servers have no metrics
            from deconvd_server.supervision.metrics_channel import start_metrics_thread

            start_metrics_thread(self._orders.metrics, daemon.metrics_view().collector_for)

        backend = daemon.backend
        assert backend is not None
        notifier = LinkNotifier(
            self._link, self._orders.watchdog_s, backend.worker, backend.connection_load
        )
        WORKERS.tell_load = notifier.tell_load
        WORKERS.request_home = partial(self._homes.request, notifier.request_home)
        if self._rooms is not None:
            QUOTA_SHARING.request_room = partial(self._rooms.request, notifier.request_room)
        return notifier

    def _note_room_request(self, request: bytes) -> None:
        if self._rooms is not None:
            self._rooms.note_request(request)


def open_link(orders: WorkerOrders, reasons: ExitReasons) -> WorkerLink:
    """Become the worker that the orders say, and do what the supervisor says from now on."""
    WORKERS.name = orders.name
    return WorkerLink(orders, reasons)
