"""The command `deconvd`, run as its users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection
from tests.client_command import deconvd, deconvd_bytes
from tests.servers import ServerProcess

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 4, 5, 6)).astype(np.float32)
W = rng.standard_normal((4, 3, 3, 2)).astype(np.float32)
B = rng.standard_normal(6).astype(np.float32)
ARGUMENTS = ["--stride", "2,3", "--pad", "1", "--outsize", "10,-", "--groups", "2"]
KEYWORDS: dict[str, Any] = {"stride": (2, 3), "pad": 1, "outsize": (10, None), "groups": 2}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, array in {"x": X, "W": W, "b": B}.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_run_writes_y(server: ServerProcess, F: Connection, files: Path) -> None:
    command = ["run", "x.npy", "W.npy", "--bias", "b.npy", *ARGUMENTS, "-o", "y.npy"]

    outcome = deconvd(*command, "--target", server.target, cwd=files)

    assert outcome.returncode == 0, outcome.stderr
    np.testing.assert_array_equal(np.load(files / "y.npy"), F.deconvolution_2d(X, W, B, **KEYWORDS))


def test_run_goes_the_way_that_is_asked_for_or_says_why_not(
    server: ServerProcess, files: Path
) -> None:
    command = ["run", "x.npy", "W.npy", "-o", "y.npy", "--groups", "2", "--target", server.target]

    by_unix = deconvd(*command, "--transport", "unix", cwd=files)
    by_tcp = deconvd(*command, "--transport", "tcp", cwd=files)

    assert by_unix.returncode == 0, by_unix.stderr
    assert " by unix; written to y.npy" in by_unix.stderr
    assert by_tcp.returncode == 2
    assert "'--transport': transport tcp must have a target of the form host:port" in by_tcp.stderr


@pytest.mark.parametrize("bias", [[], ["--bias", "b.npy"]])
def test_run_with_grad_writes_the_gradients(
    server: ServerProcess, F: Connection, files: Path, bias: list[str]
) -> None:
    gy = F.deconvolution_2d(X, W, B, **KEYWORDS)
    np.save(files / "gy.npy", gy)
    command = ["run", "x.npy", "W.npy", *bias, *ARGUMENTS, "--grad", "gy.npy", "-o", "g.npz"]

    outcome = deconvd(*command, "--target", server.target, cwd=files)

    assert outcome.returncode == 0, outcome.stderr
    expected = F.deconvolution_2d_grad(X, W, B if bias else None, gy, **KEYWORDS)
    with np.load(files / "g.npz") as written:
        assert set(written) == ({"gx", "gW", "gb"} if bias else {"gx", "gW"})
        for name in written:
            np.testing.assert_array_equal(written[name], expected._asdict()[name])


def test_bfloat16_files_are_those_of_ml_dtypes(
    server: ServerProcess, F: Connection, tmp_path: Path
) -> None:
    x, w = X.astype(ml_dtypes.bfloat16), W.astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "W.npy", w)

    outcome = deconvd(
        "run", "x.npy", "W.npy", "-o", "y.npy", "--target", server.target, cwd=tmp_path
    )

    assert outcome.returncode == 0, outcome.stderr
    written = np.load(tmp_path / "y.npy").view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(written, F.deconvolution_2d(x, w))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.npy", "absent.npy"], "cannot read absent.npy: No such file or directory"),
        (["x.npy", "text.npy"], "text.npy is not an .npy, .npz, .safetensors or PNG file"),
        (["x.npy", "b.npy"], "Error: W must have 4 dimensions, got 1"),
        (
            ["x.npy", "W.npy", "--stride", "two"],
            "'--stride': must be one integer, or two as in 2,3, got 'two'",
        ),
        (["x.npy", "W.npy", "--stride", "1,2,3"], "stride must be an int or a pair of ints"),
        (["x.npy", "W.npy", "--stride", "2,-"], "'--stride': must be one integer, or two as in"),
        (
            ["x.npy", "W.npy", "--outsize", "10"],
            "'--outsize': must be a height and a width as in 10,12",
        ),
        (["x.npy", "W.npy", "--outsize", "1,2,3"], "natural size, got '1,2,3'"),
        (["x.npy", "W.npy", "--timeout-s", "0"], "'--timeout-s': timeout_s must be positive"),
        (["x.npy", "W.npy", "--dilate", "0"], "Dilate should be positive, but 0 is supplied."),
        (["x.npy", "W.npy", "--use-cudnn", "maybe"], "'maybe' is not one of"),
        (["x.npy", "W.npy", "--target", "nowhere"], "target must be host:port or unix:path"),
        (["x.npy", "W.npy", "--target", "unix:nobody"], "unix:"),
    ],
)
def test_a_mistake_ends_run_with_one_clear_line_and_no_file(
    server: ServerProcess, files: Path, arguments: list[str], message: str
) -> None:
    (files / "text.npy").write_text("not an array")
    (files / "y.npy").write_text("an older result")
    target = [] if "--target" in arguments else ["--target", server.target]

    outcome = deconvd("run", *arguments, "-o", "y.npy", *target, cwd=files)

    assert outcome.returncode in (1, 2)
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert (files / "y.npy").read_text() == "an older result"


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe"])
def test_a_result_goes_into_a_pipe_which_stays(
    server: ServerProcess, F: Connection, files: Path, kind: str
) -> None:
    os.mkfifo(files / "pipe")
    output = files / "pipe"
    if kind == "link to a pipe":  # as /dev/stdout is
        output = files / "link"
        output.symlink_to("pipe")
    reader = subprocess.Popen(["cat", files / "pipe"], stdout=subprocess.PIPE)
    command = ["run", "x.npy", "W.npy", *ARGUMENTS, "-o", str(output), "--target", server.target]

    try:
        outcome = deconvd(*command, cwd=files)
        written, _ = reader.communicate(timeout=60)
    finally:
        reader.kill()

    assert outcome.returncode == 0, outcome.stderr
    assert (files / "pipe").is_fifo()
    y = np.load(BytesIO(written))
    np.testing.assert_array_equal(y, F.deconvolution_2d(X, W, **KEYWORDS))


def test_a_result_goes_where_a_link_leads(server: ServerProcess, files: Path) -> None:
    (files / "y.npy").symlink_to("elsewhere.npy")
    command = ["run", "x.npy", "W.npy", *ARGUMENTS, "-o", "y.npy", "--target", server.target]

    outcome = deconvd(*command, cwd=files)

    assert outcome.returncode == 0, outcome.stderr
    assert (files / "y.npy").is_symlink()
    assert (files / "elsewhere.npy").is_file()


def test_an_operand_is_read_from_a_pipe(server: ServerProcess, files: Path) -> None:
    command = ["run", "/dev/stdin", "W.npy", *ARGUMENTS, "-o", "y.npy", "--target", server.target]

    outcome = deconvd_bytes(*command, cwd=files, stdin=(files / "x.npy").read_bytes())

    assert outcome.returncode == 0, outcome.stderr


def test_one_line_at_the_end_says_what_was_done(server: ServerProcess, files: Path) -> None:
    command = ["run", "x.npy", "W.npy", *ARGUMENTS, "-o", "y.npy", "--target", server.target]

    outcome = deconvd(*command, cwd=files)

    assert outcome.returncode == 0
    assert outcome.stdout == ""
    assert re.fullmatch(
        r"y: float32 of shape \(2, 6, 10, 15\); 1\.2 kB sent, 7\.2 kB received, \d+ ms, [\d.]+ [kM]B/s by \w+; "
        r"written to y\.npy\n",
        outcome.stderr,
    )


def test_nothing_is_said_where_it_should_be_quiet(server: ServerProcess, files: Path) -> None:
    command = ["run", "x.npy", "W.npy", *ARGUMENTS, "-o", "y.npy", "--target", server.target]

    outcome = deconvd(*command, "--quiet", cwd=files)

    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


def test_programs_are_told_as_json(server: ServerProcess, files: Path) -> None:
    command = ["run", "x.npy", "W.npy", *ARGUMENTS, "-o", "y.npy", "--target", server.target]

    outcome = deconvd(*command, "--json", cwd=files)

    told = json.loads(outcome.stdout)
    assert outcome.returncode == 0
    assert told["results"] == {"y": {"shape": [2, 6, 10, 15], "dtype": "float32", "bytes": 7200}}
    assert (told["sent_bytes"], told["received_bytes"]) == (X.nbytes + W.nbytes, 7200)
    assert told["output"] == "y.npy"
    assert told["duration_ms"] > 0


def test_an_array_that_its_file_does_not_hold_is_told(files: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (1, 1, 1 << 29, 1 << 29)}
    with (files / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)

    outcome = deconvd("run", "huge.npy", "W.npy", "-o", "y.npy", cwd=files)

    assert outcome.returncode == 1
    assert outcome.stderr == (
        "Error: huge.npy is not an .npy file of numbers: its header promises 1152921504606846976 bytes of elements, "
        "and 0 follow\n"
    )


def test_status_tells_people_what_the_server_is(server: ServerProcess, tmp_path: Path) -> None:
    outcome = deconvd("status", "--target", server.target, cwd=tmp_path)

    assert outcome.returncode == 0
    assert f"{server.target}: SERVING" in outcome.stdout
    assert f"deconvd {deconvd_client.__version__}" in outcome.stdout
    assert "cpu: " in outcome.stdout


def test_status_tells_programs_the_same_as_json(server: ServerProcess, tmp_path: Path) -> None:
    outcome = deconvd("status", "--json", "--target", server.target, cwd=tmp_path)

    status = json.loads(outcome.stdout)
    assert outcome.returncode == 0
    assert status["health"] == "SERVING"
    assert status["devices"][0]["id"] == "cpu"
    assert status["max_message_bytes"] == 1 << 30


def test_status_of_nobody_is_a_failure(tmp_path: Path) -> None:
    outcome = deconvd("status", "--target", "unix:nobody-listens-here", cwd=tmp_path)

    assert outcome.returncode == 1
    assert "nobody-listens-here" in outcome.stderr


def test_the_target_can_come_from_the_environment(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECONVD_TARGET", server.target)

    assert deconvd("status", cwd=tmp_path).returncode == 0
