"""Benchmarks: what they compare us with computes the same, and what they measure can be drawn and counted."""

from __future__ import annotations

import _thread
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

import deconvd_client
from benchmarks import metrics as metrics_rounds
from benchmarks.against import main as against
from benchmarks.cards import main as cards
from benchmarks.cards_rows import CardsFile, CardsRow
from benchmarks.client_processes import Meet, start_client_processes
from benchmarks.fleet import main as fleet
from benchmarks.framing import main as framing
from benchmarks.hops import main as hops
from benchmarks.joining import main as joining
from benchmarks.layers import LAYERS
from benchmarks.links import long
from benchmarks.load import main as load
from benchmarks.many_shapes import draw_shapes
from benchmarks.many_shapes import main as many_shapes
from benchmarks.new_shapes import main as new_shapes
from benchmarks.plan_store import main as plan_store
from benchmarks.profiled import LEFT_OUT, start_profiling
from benchmarks.random_problems import draw_problem
from benchmarks.remote import main as remote
from benchmarks.second_calls import main as second_calls
from benchmarks.secure import __main__ as secure_rounds
from benchmarks.secure.__main__ import main as secure
from benchmarks.secure.rows import SecureRow, comparisons
from benchmarks.secure.ways import Keys
from benchmarks.service import main as service
from benchmarks.stock import stock_service
from benchmarks.transport.paths import ONE, TCP, run_server
from benchmarks.transport_plot import main as plot
from deconvd.errors import UnauthenticatedError
from deconvd.host.system import processors_count
from deconvd.model.geometry import Geometry
from deconvd.wire import codec
from deconvd_client import Connection, Tls

CHECKOUT = Path(__file__).parents[1]

SLOWER_BY_50_MS = """
import time

_as_it_was = Connection.deconvolution_2d


def _slower(*arguments):
    time.sleep(0.05)
    return _as_it_was(*arguments)


Connection.deconvolution_2d = _slower
"""


def test_the_long_link_is_measured_beside_a_bare_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_CONNECTIONS_COUNT": 1,
        "_CALLS_COUNT": 1,
        "_SETTLE_S": 0.0,
        "_ROUND_TRIP_S": 0.02,
        "_TRANSPORTS": ("tcp",),
    }.items():
        monkeypatch.setattr(long, name, value)

    rows = list(long.long_rows())

    assert {row.what for row in rows} >= {
        "first call, tcp",
        "new W of 512 KB, tcp",
        "8 + 8 MB, tcp",
    }
    for row in rows:
        assert row.round_trip_ms == 20
        assert row.ms > 20
        assert row.floor_ms > 20
        assert row.round_trips == pytest.approx(row.ms / 20)


def test_the_stock_service_computes_what_ours_does(F: Connection) -> None:
    (layer,) = (layer for layer in LAYERS if layer.name == "dilated 64-64 32 k3 s2 d2")
    problem = layer.problem(np.dtype(np.float32))
    generator = np.random.default_rng(0)
    x, W = (generator.standard_normal(s.shape, np.float32) for s in (problem.x, problem.W))

    with stock_service("cpu") as stock:
        y = stock(layer, x, W)

    expected = F.deconvolution_2d(x, W, None, layer.stride, layer.pad, dilate=layer.dilate)
    # sums of 1,000 products of magnitude 1, in another order where slices are cut in another way
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", ["y", "gradients"])
def test_latency_alone_is_measured_without_peers(tmp_path: Path, calls: str) -> None:
    results = tmp_path / "service.json"
    flag = "--gradients" if calls == "gradients" else "--only-latency"
    arguments = [flag, "--layer", "tiny 8-4 8 k4 s2", "--type", "float32"]

    ended = CliRunner().invoke(
        service, [*arguments, "--json", str(results)], catch_exceptions=False
    )

    assert ended.exit_code == 0
    assert re.search(r"from F\.empty: \d+\.\d+", ended.output)
    written = json.loads(results.read_text())
    assert written["calls"] == calls
    (row,) = written["rows"]
    assert row["layer"] == "tiny 8-4 8 k4 s2"
    assert row["ms"] > 0
    assert row["stock_ms"] is row["calls_per_s"] is row["floor_ms"] is None


def test_of_simulated_servers_that_die_only_their_own_filters_move(tmp_path: Path) -> None:
    results = tmp_path / "fleet.json"
    arguments = ["--servers", "3", "--servers", "20", "--filters", "600", "--json", str(results)]

    ended = CliRunner().invoke(fleet, arguments, catch_exceptions=False)

    assert ended.exit_code == 0
    for row in json.loads(results.read_text())["rows"]:
        assert row["moved_share"] == pytest.approx(1 / row["servers"], rel=0.5)
        assert (row["moved_in_vain"], row["lost"], row["retries"]) == (0, 0, 1)


def test_the_gain_of_joining_is_bounded_by_calls_without_samples(tmp_path: Path) -> None:
    results = tmp_path / "joining.json"
    arguments = ["--clients", "1", "--clients", "2", "--time-s", "0.1"]

    ended = CliRunner().invoke(
        joining, [*arguments, "--json", str(results)], catch_exceptions=False
    )

    assert ended.exit_code == 0
    rows = json.loads(results.read_text())["rows"]
    assert [row["clients"] for row in rows] == [1, 2]
    for row in rows:
        assert row["most_gain"] == row["empty_calls_per_s"] / row["calls_per_s"] > 0


def test_load_is_measured_alone_and_beside_a_flood(tmp_path: Path) -> None:
    results = tmp_path / "load.json"
    arguments = ["--time-s", "0.6", "--clients", "3", "--json", str(results)]

    ended = CliRunner().invoke(load, arguments, catch_exceptions=False)

    assert ended.exit_code == 0
    written = json.loads(results.read_text())
    assert written["alone_ms"] >= 20
    rows = written["rows"]
    assert [(row["clients"], row["load"], row["tenant"]) for row in rows] == [
        (3, 0.25, "plain"),
        (3, 2.0, "plain"),
        (3, 0.25, "beside a flood"),
        (16, 2.0, "flood"),
    ]
    for row in rows:
        assert row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
        assert row["refused"] >= 0
    assert rows[1]["calls_per_s"] > 0
    assert rows[3]["refused"] > 0


def test_shapes_are_called_for_the_first_time_with_a_store_and_without(tmp_path: Path) -> None:
    results = tmp_path / "new-shapes.json"
    arguments = ["--shapes", "2", "--type", "float16", "--json", str(results)]

    ended = CliRunner().invoke(new_shapes, arguments, catch_exceptions=False)

    assert ended.exit_code == 0
    rows = json.loads(results.read_text())["rows"]
    kinds = [(row["dtype"], row["op"], row["store"]) for row in rows]
    assert kinds == [("float16", op, store) for op in ("y", "grad") for store in (False, True)]
    for row in rows:
        assert row["slowest_ms"] >= row["first_ms"] >= row["first_server_ms"] > 0
        assert row["second_ms"] > 0
        assert row["start_s"] > 0


def test_second_calls_are_told_apart_from_calls_after_a_wait(tmp_path: Path) -> None:
    results = tmp_path / "second-calls.json"
    arguments = ["--shapes", "1", "--pause-ms", "1", "--json", str(results)]

    ended = CliRunner().invoke(second_calls, arguments, catch_exceptions=False)

    assert ended.exit_code == 0
    rows = json.loads(results.read_text())["rows"]
    ways = ("new", "kept", "known", "rested", "spun")
    assert [(row["way"], row["call"]) for row in rows] == [*product(ways, range(1, 9))]
    for row in rows:
        assert row["client_ms"] > 0
        assert row["server_ms"] > 0
        assert min(row["client_faults"], row["server_faults"]) >= 0


def test_many_shapes_are_called_once_while_both_processes_are_watched(tmp_path: Path) -> None:
    results = tmp_path / "many-shapes.json"
    assert len(set(draw_shapes(20_000))) == 20_000

    for transport in ("shared_memory", "tcp"):  # one by one, into one file
        arguments = ["--shapes", "13", "--row", "6", "--transport", transport]
        ended = CliRunner().invoke(
            many_shapes, [*arguments, "--json", str(results)], catch_exceptions=False
        )
        assert ended.exit_code == 0

    rows = json.loads(results.read_text())["rows"]
    assert [(row["transport"], row["calls"]) for row in rows] == [
        *product(("shared_memory", "tcp"), (6, 12))
    ]
    for row in rows:
        assert 0 < row["y_ms"] <= row["y_p99_ms"] <= row["slowest_ms"]
        assert 0 < row["grad_ms"] <= row["grad_p99_ms"] <= row["slowest_ms"]
        for use in (row["server"], row["client"]):
            assert use["rss_mb"] >= use["pss_mb"] >= use["anonymous_mb"] > 10
            assert use["descriptors"] > 3
        assert (row["server"]["shared_mb"] > 0) == (row["transport"] == "shared_memory")


def test_a_plan_store_is_measured_empty_full_and_overfull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_server.device.cuda.plans.store._SHARD_PLANS_COUNT", 1)
    results = tmp_path / "plan-store.json"

    ended = CliRunner().invoke(
        plan_store, ["--plans", "600", "--json", str(results)], catch_exceptions=False
    )

    assert ended.exit_code == 0
    empty, full, overfull = json.loads(results.read_text())["rows"]
    assert (empty["files"], empty["find_ms"]) == (0, None)
    assert 200 < full["files"] <= 256
    assert overfull["files"] == 600
    assert full["find_ms"] > 0
    assert overfull["find_ms"] > 0


def test_random_problems_keep_to_their_bounds() -> None:
    for number in range(300):
        drawn = draw_problem(number)

        assert drawn == draw_problem(number)
        problem = drawn.problem
        assert all(4 <= extent <= 200 for extent in problem.image)
        assert all(1 <= count <= 1024 for count in (problem.c_I, problem.c_O))
        assert all(1 <= taps <= 31 for taps in problem.kernel)
        assert all(1 <= stride <= 8 for stride in problem.geometry.stride)


def test_the_plot_has_a_line_for_every_path_that_was_measured(tmp_path: Path) -> None:
    results = CHECKOUT / "benchmarks/results/transport-2-cores.json"
    drawn = tmp_path / "plot.svg"

    ended = CliRunner().invoke(plot, [str(results), "-o", str(drawn)], catch_exceptions=False)

    assert ended.exit_code == 0
    texts = {element.text for element in ElementTree.parse(drawn).iter() if element.text}
    assert {"deconvd, F.empty", "deconvd, TCP", "one copy in memory", "256 MiB"} <= texts
    paths = {row["path"] for row in json.loads(results.read_text())["rows"]}
    legend = [
        text for text in texts if text.startswith(("deconvd", "plain", "Arrow", "bare", "one"))
    ]
    assert len(legend) == len(paths)


def test_a_calls_functions_are_counted_on_both_sides_of_each_way(tmp_path: Path) -> None:
    results = tmp_path / "hops.json"
    arguments = ["--way", "shared_memory", "--way", "grpc_message", "--files"]

    ended = CliRunner().invoke(hops, [*arguments, "--json", str(results)], catch_exceptions=False)

    assert ended.exit_code == 0
    rows = json.loads(results.read_text())["rows"]
    sides = [(row["way"], row["side"]) for row in rows]
    assert sides == list(product(("shared_memory", "grpc_message"), ("client", "server")))
    for row in rows:
        assert row["python_calls"] >= row["stays"] == len(row["chain"]) >= row["files"] > 0
        assert "deconvd.direct.busy_polling" not in row["chain"]
    counts = {row["way"]: row["python_calls"] for row in rows if row["side"] == "client"}
    assert counts["shared_memory"] <= 93  # 90 of them, and some for what chance adds
    assert counts["grpc_message"] <= 52  # 46
    client, server, _, grpc_server = (row["chain"] for row in rows)
    assert "deconvd_client.operations" in client
    assert "deconvd_server.shared_memory.lender" in server
    assert not {"deconvd.direct.frame_stream", "deconvd_server.shared_memory.lender"} & set(
        grpc_server
    )
    assert re.search(r"^    \S+ - .*\bconnection\b", ended.output, re.MULTILINE)


def _start_by_threading(work: Callable[[], object]) -> None:
    threading.Thread(target=work).start()


def _start_beneath_threading(work: Callable[[], object]) -> None:
    _thread.start_new_thread(work, ())


@pytest.mark.parametrize("start", [_start_by_threading, _start_beneath_threading])
def test_functions_count_in_each_kind_of_thread(
    start: Callable[[Callable[[], object]], None],
) -> None:
    ended: SimpleQueue[None] = SimpleQueue()

    def work() -> None:
        processors_count()
        Geometry.from_arguments(1, 0)
        ended.put(None)

    with start_profiling() as profile:
        profile.begin()
        start(work)
        ended.get(timeout=60)
        (modules,) = profile.end()

    assert modules[0] == "deconvd.host.system"
    assert set(modules[1:]) == {"deconvd.model.geometry"}


def test_another_checkout_is_timed_beside_this_one_by_its_own_code(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("proto", "client", "server", "benchmarks"):
        shutil.copytree(CHECKOUT / folder, other / folder)
    with (other / "client/deconvd_client/connection.py").open("a") as module:
        module.write(SLOWER_BY_50_MS)
    options = ["--bytes", "1024", "--path", "memcpy", "--path", "tcp", "--time-s", "0.1"]

    ended = CliRunner().invoke(
        against, ["--rounds", "2", str(other), "transport", *options], catch_exceptions=False
    )

    assert ended.exit_code == 0
    rows = re.findall(r"^(\w+) 1024 ms +([\d.]+) +([\d.]+) +([\d.]+)$", ended.output, re.MULTILINE)
    assert [name for name, *_ in rows] == ["memcpy", "tcp"]
    others_ms, ours_ms, ratio = map(float, rows[1][1:])
    assert others_ms >= 50
    assert ratio == pytest.approx(ours_ms / others_ms, abs=1e-3)


@pytest.mark.parametrize("module", LEFT_OUT)
def test_modules_that_do_not_count_exist(module: str) -> None:
    assert find_spec(module) is not None


def test_framing_by_hand_is_timed_beside_protobufs(tmp_path: Path) -> None:
    results = tmp_path / "framing.json"
    sizes = [argument for size in ("4096", "262144") for argument in ("--bytes", size)]

    ended = CliRunner().invoke(
        framing, [*sizes, "--time-s", "0.1", "--json", str(results)], catch_exceptions=False
    )

    assert ended.exit_code == 0
    written = json.loads(results.read_text())
    assert [row["bytes"] for row in written["rows"]] == [4096, 262144]
    for row in written["rows"]:
        assert row["framing_ratio"] == row["protobuf_framing_ms"] / row["framing_ms"]
        assert row["call_ms"] > row["framing_ms"] > 0
    peaks_mib = written["peaks_mib"]
    # by hand a request is read where it is, and a response is copied once
    assert peaks_mib["by hand"] == pytest.approx([0, 32], abs=4)
    assert min(peaks_mib["protobuf"]) > 48
    assert codec._MAX_SMALL_BYTES == 64 << 10  # as it was before


def test_far_calls_are_timed_beside_the_bare_program_in_parts_of_one_table(
    tmp_path: Path,
) -> None:
    results = tmp_path / "remote.json"
    options = ["--layer", "tiny 8-4 8 k4 s2", "--type", "float32", "--json", str(results)]
    options += ["--time-s", "0.1", "--warm-up-calls", "2"]

    def measure(*more: str) -> tuple[str, dict[tuple[int, str], dict[str, object]]]:
        ended = CliRunner().invoke(remote, [*options, *more], catch_exceptions=False)
        assert ended.exit_code == 0
        rows = json.loads(results.read_text())["rows"]
        by_key = {(row["clients"], row["path"]): row for row in rows}
        assert len(by_key) == len(rows)
        return ended.output, by_key

    _, first = measure("--clients", "1", "--path", "tcp")
    output, both = measure("--clients", "1", "--clients", "2")

    assert first.keys() == {(1, "tcp")}
    assert first[1, "tcp"]["floor_gb_per_s"] is None
    paths = ("bare_4", "bare_1", "tcp", "grpc", "shared_memory")
    assert both.keys() == set(product((1, 2), paths))
    assert both[1, "tcp"]["ms"] != first[1, "tcp"]["ms"]
    for (clients, _), row in both.items():
        assert row["layer"] == "tiny 8-4 8 k4 s2"
        assert row["dtype"] == "float32"
        assert row["floor_gb_per_s"] == both[clients, "bare_4"]["gb_per_s"]
    assert (
        len(re.findall(r"\d ms +\d+\.\d+ GB/s +\d+\.\d+ of the floor$", output, re.MULTILINE)) == 10
    )


def test_calls_to_several_processes_are_counted_beside_the_bare_program(tmp_path: Path) -> None:
    results = tmp_path / "cards.json"
    options = ["--device", "cpu", "--layer", "tiny 8-4 8 k4 s2", "--type", "float32"]
    options += ["--processes", "2", "--assign", "--time-s", "0.1", "--warm-up-s", "0"]

    for more in (["--operands", "plain"], ["--operands", "empty"]):
        ended = CliRunner().invoke(
            cards,
            [*options, *more, "--clients", "2", "--json", str(results)],
            catch_exceptions=False,
        )
        assert ended.exit_code == 0
        assert re.search(r"2 clients: +\d+\.\d calls/s, +\d+\.\d\d of the floor$", ended.output)

    written = json.loads(results.read_text())
    assert (written["card"], written["processes"]) == (None, 2)
    assert [row["operands"] for row in written["rows"]] == ["plain", "empty"]
    for row in written["rows"]:
        assert row["calls_per_s"] > 0
        assert row["floor_calls_per_s"] > 0
        del row["operands"], row["calls_per_s"], row["floor_calls_per_s"]
        assert row == {"cards": 1, "layer": "tiny 8-4 8 k4 s2", "dtype": "float32", "clients": 2}


def test_two_cards_are_compared_with_one_that_was_measured_before() -> None:
    file = CardsFile(None, {})
    file.add(CardsRow(1, "a", "float16", "empty", 8, 1000, 2000))

    words = file.add(CardsRow(2, "a", "float16", "empty", 8, 1750, 3600))

    assert words.endswith("0.49 of the floor; 1.75 times one card, the floor 1.80 times")
    assert "times one card" not in file.add(CardsRow(2, "a", "float16", "plain", 8, 1, 1))


def test_rows_of_another_host_are_not_mixed_with_those_of_this_one(tmp_path: Path) -> None:
    results = tmp_path / "remote.json"
    file = '{"card": null, "host": "another, 4 processors", "commit": "590f135", "rows": []}'
    results.write_text(file)

    ended = CliRunner().invoke(remote, ["--json", str(results)], catch_exceptions=False)

    assert ended.exit_code == 2
    assert "has rows of the host another, 4 processors" in ended.output
    assert results.read_text() == file


def _end_one(meet: Meet, end: Callable[[], None]) -> None:
    if meet() == 0:
        end()
    meet()  # the other waits for it here


def _fail() -> None:
    raise LookupError("a failure of one")


def _die() -> None:
    os._exit(1)


@pytest.mark.parametrize(("end", "error"), [(_fail, LookupError), (_die, BrokenProcessPool)])
def test_a_client_process_that_ends_leaves_no_other_waiting(
    end: Callable[[], None], error: type[Exception]
) -> None:
    with start_client_processes([2]) as clients, pytest.raises(error):
        clients.run(2, _end_one, end)


def test_what_secures_calls_is_timed_beside_the_bare_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure_rounds, "_LEAST_ROUNDS", 1)
    results = tmp_path / "secure.json"
    options = ["--bytes", "1024", "--bytes", "1048576", "--time-s", "0", "--json", str(results)]

    ended = CliRunner().invoke(secure, options, catch_exceptions=False)

    assert ended.exit_code == 0
    written = json.loads(results.read_text())
    assert {"host", "commit", "date"} < written.keys()
    rows = {(row["path"], row["secured"], row["bytes"]): row for row in written["rows"]}
    ways = {*product(("shared_memory", "unix", "tcp", "grpc_tcp"), ("plain", "token"))}
    ways |= {("tcp", "tls"), ("grpc_tcp", "tls")}
    assert rows.keys() == {(*way, size) for way, size in product(ways, (1024, 1 << 20))}
    assert len(rows) == len(written["rows"])
    for (path, secured, size), row in rows.items():
        assert row.keys() == {"path", "secured", "bytes", "ms", "floor_ms"}
        assert min(row["ms"], row["floor_ms"]) > 0
        is_floor_of_plain = row["floor_ms"] == rows[path, "plain", size]["floor_ms"]
        assert is_floor_of_plain == (secured != "tls")
    assert rows["tcp", "tls", 1024]["floor_ms"] == rows["grpc_tcp", "tls", 1024]["floor_ms"]
    assert (
        ended.output.count("(wanted: ")
        == len(ways - {way for way in ways if way[1] == "plain"}) * 2
    )


def test_small_calls_are_timed_with_and_without_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_TURN_S": 0.1, "_LEAST_ROUNDS": 1, "_SCRAPES_COUNT": 1}.items():
        monkeypatch.setattr(metrics_rounds, name, value)
    results = tmp_path / "metrics.json"
    options = ["--transport", "unix", "--time-s", "0", "--json", str(results)]

    ended = CliRunner().invoke(metrics_rounds.main, options, catch_exceptions=False)

    assert ended.exit_code == 0
    assert re.search(r"^unix +[\d.]+ +[\d.]+ +[\d.]+", ended.output, re.MULTILINE)
    assert re.search(r"a scrape with 512 tenants: [\d.]+ ms", ended.output)
    calls, *scrapes = json.loads(results.read_text())["rows"]
    assert calls.pop("transport") == "unix"
    assert min(calls.values()) > 0
    assert [each["tenants"] for each in scrapes] == [1, 64, 512]
    assert scrapes[0]["size_bytes"] < scrapes[2]["size_bytes"]


def test_the_secured_servers_of_the_benchmark_ask_who_calls(tmp_path: Path) -> None:
    keys = Keys.make(tmp_path)

    with (
        run_server("deconvd", TCP, str(keys.tokens), *map(str, keys.certificate)) as target,
        deconvd_client.connect(target, tls=Tls(ca=keys.ca)) as stranger,
        pytest.raises(UnauthenticatedError),
    ):
        stranger.deconvolution_2d(ONE, ONE)


def test_what_tls_adds_is_compared_with_what_it_adds_to_the_bare_program() -> None:
    small, large = 1 << 10, 32 << 20
    rows = [
        SecureRow("tcp", "plain", small, 0.100, 0.050),
        SecureRow("tcp", "tls", small, 0.140, 0.065),
        SecureRow("tcp", "plain", large, 20.0, 25.0),
        SecureRow("tcp", "token", large, 20.2, 25.0),
        SecureRow("tcp", "tls", large, 44.0, 40.0),
        SecureRow("grpc_tcp", "plain", large, 60.0, 25.0),
        SecureRow("grpc_tcp", "tls", large, 80.0, 40.0),
    ]

    lines = list(comparisons(rows, {small: 8.0}))

    assert lines == [
        "tcp, 1 KiB: TLS adds 40.0 us, and to the bare program 15.0 (8.0 if that does nothing else): "
        "25.0 more (wanted: at most 20)",
        "tcp, 32 MiB: with a token 1.010 of the time without (wanted: nothing measurable)",
        "tcp, 32 MiB: with TLS 1.100 of the bare program (wanted: at most 1.15)",
        "grpc_tcp, 32 MiB: with TLS 80.000 ms (wanted: at most 84.000, which is 1.15 times 60.000 "
        "without, and 15.000 more)",
    ]
