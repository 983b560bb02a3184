"""What a supervisor is made of, without processes: parts of the machine, ports, paths, names, sums of metrics."""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from deconvd.errors import InvalidArgumentError
from deconvd.host.machine import PARTS_VARIABLE, memory_bytes, processors_count
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.resources.capabilities import NAME_BYTES, new_name
from deconvd_server.resources.socket_file import AddressInUseError
from deconvd_server.resources.worker_table import WORKERS, WorkerTable
from deconvd_server.supervision.layout import (
    check_ports,
    own_addresses,
    own_options,
    worker_places,
)
from deconvd_server.supervision.link import MAX_PACKET_BYTES
from deconvd_server.supervision.merged_metrics import MergedMetrics
from deconvd_server.supervision.metrics_channel import MetricsChannel, start_metrics_thread
from deconvd_server.supervision.orders import WorkerOrders
from deconvd_server.supervision.shared_path import SharedPath
from deconvd_server.transports.listen import listen_tcp, reserve_port

OPTIONS = {
    "device_memory_bytes": 1000,
    "resident_memory_bytes": 0,
    "shared_memory_bytes": 900,
    "spill_memory_bytes": None,
    "tenant_bytes": 50,
    "threads": 2,
}


def test_each_device_gets_its_processes() -> None:
    places = worker_places(2, ["cuda:0", "cuda:1"])

    assert [(place.name, place.device, place.sharers_count) for place in places] == [
        ("0", "cuda:0", 2),
        ("1", "cuda:0", 2),
        ("2", "cuda:1", 2),
        ("3", "cuda:1", 2),
    ]


def test_too_many_processes_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at most 128 processes, got 64 for each of 3"):
        worker_places(64, ["cuda:0", "cuda:1", "cuda:2"])


def test_what_is_given_for_all_is_shared_out() -> None:
    options = own_options(OPTIONS, worker_places(2, ["cuda:0", "cuda:1", "cuda:2"])[3], 6)

    assert options["device"] == "cuda:1"
    assert options["device_memory_bytes"] == 500  # of two on the card
    assert options["shared_memory_bytes"] == 150  # of six on the host
    assert options["threads"] == 1
    # nothing, the default, or counted together: as given
    assert not {"resident_memory_bytes", "spill_memory_bytes", "tenant_bytes"} & set(options)


def test_a_process_has_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_bytes, count = memory_bytes(), processors_count()
    monkeypatch.setenv(PARTS_VARIABLE, "3")

    assert memory_bytes() == whole_bytes // 3
    assert processors_count() == max(count // 3, 1)


def test_ports_that_follow_each_other_must_be_ports() -> None:
    check_ports("direct_port", 65533, 3)
    check_ports("direct_port", 0, 3)
    with pytest.raises(InvalidArgumentError, match="--direct-port must leave a port") as raised:
        check_ports("direct_port", 65534, 3)

    assert raised.value.argument == "direct_port"


def test_each_has_an_address_of_its_own_beside_each_shared_one(tmp_path: Path) -> None:
    shared = ["127.0.0.1:50051", "[::1]:50051", f"unix:{tmp_path}/a.sock"]

    own = own_addresses(shared, "7", 50061)

    assert own == ["127.0.0.1:50061", "[::1]:50061", f"unix:{tmp_path.resolve()}/a.sock.7"]


def test_a_path_that_has_no_room_for_a_number_is_refused(tmp_path: Path) -> None:
    name = "a" * (107 - len(os.fsencode(f"{tmp_path.resolve()}/")))
    with pytest.raises(InvalidArgumentError, match=r"to which \.0 can be added") as raised:
        own_addresses([f"unix:{tmp_path}/{name}"], "0", 0)

    assert raised.value.argument == "listen"


def test_orders_reach_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = WorkerOrders(
        name="1",
        link=5,
        metrics=None,
        quotas=None,
        card_parts_count=2,
        is_plan_store_lasting=True,
        watchdog_s=30.0,
        options={"plan_store": Path("/a"), "addresses": ("b", "c"), "threads": 2},
    )
    for name, value in orders.to_environment().items():
        monkeypatch.setenv(name, value)

    assert WorkerOrders.take() == orders
    assert WorkerOrders.take() is None


@pytest.fixture
def table() -> Iterator[WorkerTable]:
    """The table of this process, as one of three."""
    WORKERS.name = "2"
    WORKERS.workers = [
        pb.Worker(name="1", grpc_port=50061, unix_sockets=["/run/a.sock.1"]),
        pb.Worker(name="2", grpc_port=50062),
    ]
    yield WORKERS
    WORKERS.name, WORKERS.workers = "", ()


def test_names_say_who_has_made_them(table: WorkerTable) -> None:
    name = new_name()

    assert (len(name), name[0]) == (NAME_BYTES, 2)
    assert table.hint(name) == ""
    assert table.hint(b"\x01" + name[1:]) == (
        "; worker 1 has made it, which alone answers on port 50061 and unix:/run/a.sock.1"
    )
    assert table.hint(b"\x03" + name[1:]) == table.hint(b"") == ""


def test_the_largest_table_fits_into_a_packet() -> None:
    worker = pb.Worker(
        name="127",
        grpc_port=65535,
        unix_sockets=[f"/{'a' * 106}"] * 8,
        devices=["cuda:127"],
        instance_id="a" * 32,
        is_serving=True,
    )
    table = pb.GetServerInfoResponse(workers=[worker] * 128).SerializeToString()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setblocking(False)
        one.send(b"T" + table)
        assert len(other.recv(MAX_PACKET_BYTES)) == 1 + len(table)


def test_a_reserved_port_is_for_those_that_share_it_alone() -> None:
    (keeper,) = reserve_port(["127.0.0.1:0"], 0, "calls")
    with keeper:
        address = "{}:{}".format(*keeper.getsockname())
        port = keeper.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(keeper.getsockname())
        for refused in (reserve_port, listen_tcp):
            with pytest.raises(AddressInUseError, match="cannot listen for calls"):
                refused([address], port, "calls")
        listeners = [
            listener
            for _ in range(2)
            for listener in listen_tcp([address], port, "calls", shares_port=True)
        ]
        socket.create_connection(keeper.getsockname()).close()
        with pytest.raises(AddressInUseError):
            reserve_port([address], port, "calls")
        for listener in listeners:
            listener.close()


def test_a_shared_path_leads_to_one_socket_after_the_other(tmp_path: Path) -> None:
    path = SharedPath(f"unix:{tmp_path}/a.sock")
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for number, listener in enumerate((first, second)):
            listener.bind(f"{tmp_path}/a.sock.{number}")
            listener.listen()
            path.lead_to(f"{tmp_path}/a.sock.{number}")
            path.lead_to(f"{tmp_path}/a.sock.{number}")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{tmp_path}/a.sock")
                listener.accept()[0].close()
        (tmp_path / "a.sock").unlink()  # by someone who tidies up
        path.lead_to(f"{tmp_path}/a.sock.1")
        with pytest.raises(AddressInUseError, match="a live server listens there"):
            SharedPath(f"unix:{tmp_path}/a.sock")
    path.remove()

    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.sock.0", "a.sock.1"]


def test_a_path_of_dead_processes_is_taken_and_another_ones_is_left(tmp_path: Path) -> None:
    dead = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    path = SharedPath(f"unix:{dead}")
    assert not dead.exists()
    dead.write_text("of somebody else")
    path.remove()

    assert dead.read_text() == "of somebody else"


class Counted:
    """The metrics of a worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("calls", "Calls.", ["method"], registry=self.registry)
        self.wait = Gauge("deconvd_queue_wait_seconds", "Wait.", registry=self.registry)
        self.open = Gauge("open", "Open.", registry=self.registry)
        self.times = Histogram("times", "Times.", buckets=(1, 2), registry=self.registry)
        mine, theirs = socket.socketpair()
        start_metrics_thread(theirs.detach(), lambda identity: self.collector(identity))
        self.channel = MetricsChannel(mine)
        self.delay = threading.Event()
        self.delay.set()

    def collector(self, identity: str) -> Collector:
        self.delay.wait()
        if identity == "broken":
            raise ValueError("this is a test")
        return self.registry


def values(metrics: MergedMetrics, reader: str = "") -> dict[str, float]:
    collected = metrics.collector_for(reader).collect()
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for metric in collected
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_metrics_of_workers_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd_server.supervision.merged_metrics._ANSWER_S", 2.0)
    workers = [Counted(), Counted()]
    metrics = MergedMetrics(lambda: [each.channel for each in workers], list, ["reader"])
    for worker in workers:
        worker.calls.labels("a").inc(2)
        worker.open.set(3)
        worker.times.observe(1.5)
    workers[0].wait.set(0.5)
    workers[1].calls.labels("b").inc()
    all_of_both = {
        "calls_totala": 4,
        "calls_totalb": 1,
        "deconvd_queue_wait_seconds": 0.5,
        "open": 6,
        "times_bucket1.0": 0,
        "times_bucket2.0": 2,
        "times_bucket+Inf": 2,
        "times_count": 2,
        "times_sum": 3,
    }

    assert values(metrics) == values(metrics, "reader") == all_of_both

    workers[1].delay.clear()  # it hangs: what it last said still counts
    workers[0].calls.labels("a").inc()
    assert values(metrics)["calls_totala"] == 5
    workers[1].delay.set()
    workers[1].calls.labels("a").inc()
    assert values(metrics)["calls_totala"] == 6  # and not an answer that came too late

    ended = workers.pop()
    ended.channel.close()
    after = values(metrics)
    assert (after["calls_totala"], after["calls_totalb"], after["times_sum"]) == (6, 1, 3)
    assert after["open"] == 3
    workers.append(Counted())
    workers[1].calls.labels("a").inc()
    assert values(metrics)["calls_totala"] == 7
    assert values(metrics, "broken") == {}
    for worker in workers:
        worker.channel.close()


def test_not_a_number_stays_one() -> None:
    worker = Counted()
    worker.open.set(math.inf)

    assert values(MergedMetrics(lambda: [worker.channel], list, []))["open"] == math.inf
    worker.channel.close()
