"""`deconvd bench`: what it measures, how it divides the time of a call, what it shows, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd_client import CallLedger, Connection
from deconvd_client.cli.bare_sockets import BareCertificate, bare_calls, bare_server
from deconvd_client.cli.bench_problems import (
    LAYERS_BY_NAME,
    BenchLayer,
    BenchOperands,
    downlink_problem,
    uplink_problem,
)
from deconvd_client.cli.call_times import PARTS, CallTimes
from tests.certificates import Authority, CertificateFiles
from tests.client_command import COMMAND, deconvd, environment_without, read_terminal
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process

BRIEF = ["bench", "--layer", "tiny", "--dtype", "float32", "--time-s", "0.1"]
WAYS = ["shared_memory", "unix", "tcp", "grpc"]
ODD = BenchLayer("odd", (2, 6, 5, 4), (6, 2, 3, 2), Geometry.from_arguments(2, 1, groups=3))
ONE = BenchLayer("one", (3, 2, 1, 1), (2, 1, 1, 1), Geometry())


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    with server_process(directory, listen=("127.0.0.1:0", "unix")) as running:
        yield running


def test_every_way_is_measured_beside_its_floor(tcp_server: ServerProcess, tmp_path: Path) -> None:
    command = [*BRIEF, "--layer", "small", "--json", "rows.json", "--picture", "times.svg"]

    outcome = deconvd(*command, "--target", tcp_server.target, cwd=tmp_path)

    assert (outcome.returncode, outcome.stderr) == (0, "")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["not_by"] == {}
    rows = written["rows"]
    assert [(row["layer"], row["way"]) for row in rows] == [
        (layer, way) for layer in ("tiny", "small") for way in WAYS
    ]
    for row in rows:
        assert list(row["parts_ms"]) == list(PARTS)
        assert min(row["parts_ms"].values()) >= 0
        assert sum(row["parts_ms"].values()) == pytest.approx(row["ms"])
        assert row["compute_ms"] <= row["parts_ms"]["compute"]
        floor_ms = row["smallest_ms"] + row["bytes_ms"] + row["compute_ms"]
        assert row["floor_ms"] == pytest.approx(floor_ms)
        assert row["floors"] == pytest.approx(row["ms"] / floor_ms)
        assert f"  {row['way']} " in outcome.stdout
    assert (rows[0]["sent_bytes"], rows[0]["received_bytes"]) == (2048 + 2048 + 16, 4096)
    assert outcome.stdout.count(" floors\n") == 2
    assert ElementTree.parse(tmp_path / "times.svg").getroot().tag.endswith("svg")


def test_a_layer_of_ones_own_is_measured(server: ServerProcess, tmp_path: Path) -> None:
    command = ["bench", "--shape", "2,3,5,6", "3,4,2,2", "--stride", "2", "--pad", "0,1"]
    command += ["--dtype", "bfloat16", "--time-s", "0.1", "--json", "rows.json"]

    outcome = deconvd(*command, "--picture", "times.png", "--target", server.target, cwd=tmp_path)

    assert outcome.returncode == 0, outcome.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {tuple(row["y"]) for row in written["rows"]} == {(2, 4, 10, 10)}
    assert {row["dtype"] for row in written["rows"]} == {"bfloat16"}
    with Image.open(tmp_path / "times.png") as image:
        assert image.width > 500


def test_why_a_way_does_not_reach_the_server_is_told(server: ServerProcess, tmp_path: Path) -> None:
    outcome = deconvd(*BRIEF, "--json", "rows.json", "--target", server.target, cwd=tmp_path)

    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in written["rows"]] == ["shared_memory", "unix", "grpc"]
    (reason,) = written["not_by"].values()
    assert f"not by tcp: {reason}\n" in outcome.stdout


def test_a_server_without_direct_connections_and_shared_memory_is_reached_by_grpc(
    tmp_path: Path,
) -> None:
    options = ["--no-direct-calls", "--shared-memory-bytes", "0"]
    with server_process(tmp_path, *options) as running:
        outcome = deconvd(*BRIEF, "--json", "rows.json", "--target", running.target, cwd=tmp_path)

    assert outcome.returncode == 0, outcome.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in written["rows"]] == ["grpc"]
    assert written["not_by"].keys() == {"shared_memory", "unix", "tcp"}


@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_terminal_is_shown_a_drawn_table_if_rich_is_there(
    server: ServerProcess, tmp_path: Path, is_drawn: bool
) -> None:
    hidden = {} if is_drawn else environment_without("rich", tmp_path / "packages")
    terminal, its_end = pty.openpty()
    command = [*COMMAND, *BRIEF, "--target", server.target]
    environment = os.environ | hidden | {"TERM": "xterm", "COLUMNS": "120"}

    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=its_end) as process:
        os.close(its_end)
        shown = read_terminal(terminal, "not by tcp")
        os.close(terminal)

    assert process.returncode == 0
    assert ("│ shared_memory" in shown) == is_drawn
    assert ("  shared_memory " in shown) != is_drawn


def test_ctrl_c_ends_it_and_its_bare_program(
    server: ServerProcess, tmp_path: Path, obeys_signals: None
) -> None:
    command = [*COMMAND, "bench", "--time-s", "600", "--target", server.target]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: bool(children.read_text()))
        bare = Path("/proc", children.read_text().split()[0])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (130, "Interrupted\n")
    wait_until(lambda: not bare.exists())


def test_the_bare_program_ends_with_the_process_that_started_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        command = [COMMAND[0], "-m", "deconvd_client.cli.bare_sockets", str(descriptor)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[descriptor]) as process:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0


@pytest.mark.parametrize("is_unix", [False, True])
def test_the_bare_program_moves_every_byte_there_and_back(is_unix: bool) -> None:
    sent, received = np.zeros(1_000_003, np.uint8), np.zeros(2_000_001, np.uint8)

    with bare_server(is_unix=is_unix) as address, bare_calls(address, 3, sent, received) as call:
        for _ in range(2):
            received[...] = 0
            call()

            assert received.all()  # the server sends ones


def test_the_bare_program_moves_every_byte_with_tls(
    authority: Authority, loopback_certificate: CertificateFiles
) -> None:
    certificate = BareCertificate(loopback_certificate.cert, loopback_certificate.key)
    tls = ssl.create_default_context(cafile=authority.ca)
    sent, received = np.zeros(1_000_003, np.uint8), np.zeros(2_000_001, np.uint8)

    with (
        bare_server(certificate=certificate) as address,
        bare_calls(address, 3, sent, received, tls) as call,
    ):
        call()

    assert received.all()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "nobody"),
        (["--layer", "huge"], 2, "'huge' is not one of"),
        (["--dtype", "int8"], 2, "'int8' is not one of"),
        (["--time-s", "0"], 2, "0"),
        (["--stride", "2"], 2, "--stride and --pad are those of --shape, which is missing"),
        (["--shape", "1,2", "3"], 1, "x must have 4 dimensions"),
        (["--shape", "1,2,3,x", "2,1,1,1"], 2, "must be four integers as in 8,64,32,32"),
        (["--shape", "1,2,3,4", "3,1,1,1"], 1, "W must have as many input channels"),
        (["--shape", "1,2,3,4", "2,1,1,1", "--stride", "0"], 2, "stride must be from 1"),
        (
            ["--json", "missing/rows.json"],
            1,
            "cannot write missing/rows.json: there is no directory",
        ),
        (["--picture", "times.jpg"], 2, "times.jpg must end in .png, .svg, .pdf"),
        (["--picture", "missing/times.png"], 1, "cannot write missing/times.png"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    outcome = deconvd("bench", *options, "--target", "unix:nobody", cwd=tmp_path)

    assert outcome.returncode == code
    assert message in " ".join(outcome.stderr.split())
    assert not outcome.stdout


def test_without_matplotlib_a_picture_is_refused_with_a_remedy(tmp_path: Path) -> None:
    environment = environment_without("matplotlib", tmp_path / "packages")
    command = [*BRIEF, "--picture", "times.png", "--target", "unix:nobody"]

    outcome = deconvd(*command, cwd=tmp_path, environment=environment)

    assert outcome.returncode == 1
    assert outcome.stderr == "Error: --picture needs matplotlib: run pip install 'deconvd[cli]'\n"


@pytest.mark.parametrize("layer", [*LAYERS_BY_NAME.values(), ODD, ONE])
def test_calls_in_one_direction_have_its_bytes_alone(layer: BenchLayer) -> None:
    problem = layer.problem(np.dtype(np.float32))

    up, down = uplink_problem(problem), downlink_problem(problem)

    assert up.x == problem.x
    assert max(up.output) <= 2
    assert down.y == problem.y
    assert max(down.image) <= 2


def test_no_element_of_a_result_is_zero(F: Connection) -> None:
    down = BenchOperands.of(downlink_problem(ODD.problem(np.dtype(np.float16))))

    y = F.deconvolution_2d(down.x, down.W, down.b, **down.geometry.arguments)

    assert np.count_nonzero(y) == y.size


def times(total_ms: float, called_ms: float, **stages_ms: float) -> CallTimes:
    return CallTimes.of(total_ms, [CallLedger("Deconvolve", called_ms, 0.0, stages_ms)])


def test_what_is_no_stage_of_the_server_is_the_client_or_the_way() -> None:
    measured = times(10, 9, queue=1, follow=0.5, upload=1, compute=2, download=1.5)

    assert measured == CallTimes(
        total_ms=10,
        encode_ms=1,
        queue_ms=1,
        upload_ms=1.5,
        compute_ms=2,
        download_ms=1.5,
        travel_ms=3,
    )


def test_stages_that_overlap_share_the_time_that_they_take_together() -> None:
    measured = times(10, 9, upload=6, compute=12)

    assert (measured.upload_ms, measured.compute_ms, measured.travel_ms) == (3, 6, 0)


@pytest.mark.parametrize(
    ("up_ms", "down_ms", "smallest_ms", "there_ms"),
    [
        (4, 7, 1, 3.5 + 0.5),  # one third of 9, beside half of 1, and the upload
        (1, 1, 1, 5.5),
        (2, 2, 20, 5.5),
    ],
)
def test_calls_in_one_direction_say_how_much_of_the_way_is_there(
    up_ms: float, down_ms: float, smallest_ms: float, there_ms: float
) -> None:
    whole = times(14, 13, upload=0.5, compute=2, download=0.5)

    parts_ms = whole.parts_ms(
        times(up_ms, up_ms), times(down_ms, down_ms), times(smallest_ms, smallest_ms)
    )

    assert parts_ms["there"] == pytest.approx(there_ms)
    assert sum(parts_ms.values()) == pytest.approx(14)


def test_the_typical_call_is_neither_the_fastest_nor_the_slowest() -> None:
    typical = CallTimes.typical([times(ms, ms) for ms in (1, 4, 6, 1000)])

    assert (typical.total_ms, typical.travel_ms) == (5, 5)


def test_a_problem_of_one_pixel_can_be_measured() -> None:
    one = TensorSpec((3, 1, 1, 1), np.dtype(np.float32))
    assert downlink_problem(ONE.problem(one.dtype)) == Problem(
        one, TensorSpec((1, 1, 1, 1), one.dtype), Geometry()
    )
