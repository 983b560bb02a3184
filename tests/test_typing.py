"""A second type checker, pyright, sees the public API as users do: mypy alone would know its own dialect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.environments import ROOT

PUBLIC_API = ROOT / "tests" / "typing" / "public_api.py"

HEADER = """
import numpy as np
import deconvd_client
F = deconvd_client.connect("host:50051")
x = np.zeros((1, 1, 4, 4), np.float32)
"""

MISTAKES = {
    "F.deconvolution_2d(x)": "reportCallIssue",
    "F.deconvolution_2d('x', x)": "reportArgumentType",
    "F.deconvolution_2d(x, x, strides=2)": "reportCallIssue",
    "F.deconvolution_2d(x, x, None, 1, 0, None, 2)": "reportCallIssue",
    "F.deconvolution_2d(x, x, stride='2')": "reportArgumentType",
    "F.deconvolution_2d_grad(x, x, None)": "reportCallIssue",
    "F.deconvolution_2d_grad(x, x, None, x).gx.shape": "reportOptionalMemberAccess",
    "F.deconvolution_2d_grad(x, x, None, x).gy": "reportAttributeAccessIssue",
    "F.put(x) + F.put(x)": "reportOperatorIssue",
    "F.remote.put(x)": "reportAttributeAccessIssue",
    "F.put(3)": "reportArgumentType",
    "F.put(x).shape = (1,)": "reportAttributeAccessIssue",
    "F.vjp(x, x)(x)": "reportCallIssue",
    "F.vjp(x, x)[1](x, 'gx')": "reportCallIssue",
    "F.using_config('autotune')": "reportCallIssue",
    "F.empty()": "reportCallIssue",
    "F.last_ledger['queue_us'] = 1": "reportIndexIssue",
    "F.server_info().version = 'mine'": "reportAttributeAccessIssue",
    "deconvd_client.connect(timeout=3)": "reportCallIssue",
    "deconvd_client.output_shape(3, (1, 1, 2, 2))": "reportArgumentType",
    "F.ledgers()[0]": "reportIndexIssue",
    "deconvd_client.connect('host:50051', 3.0)": "reportCallIssue",
    "deconvd_client.connect('host:50051', timeout_s='3')": "reportArgumentType",
    "deconvd_client.deconvolution_2d(x, x)": "reportAttributeAccessIssue",
}
"""What users may write by mistake, and the rule by which pyright tells them so."""


def run_pyright(directory: Path, *arguments: str) -> dict[str, Any]:
    """Run pyright in a directory, with the sources where users have installed packages, and return its report."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("proto", "client"))
    ended = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def errors_in(directory: Path, source: str) -> list[tuple[int, str]]:
    """Return the line, from 0 on, and the rule of each error that a user with pyright's defaults is told."""
    (directory / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    (directory / "source.py").write_text(source)
    report = run_pyright(directory, "--project", str(directory))
    assert report["summary"]["filesAnalyzed"] == 1
    return [
        (error["range"]["start"]["line"], error["rule"])
        for error in report["generalDiagnostics"]
        if error["severity"] == "error"
    ]


def test_pyright_sees_the_types_that_users_are_promised(tmp_path: Path) -> None:
    assert errors_in(tmp_path, PUBLIC_API.read_text()) == []


def test_pyright_tells_users_of_their_mistakes(tmp_path: Path) -> None:
    told = errors_in(tmp_path, HEADER + "\n".join(MISTAKES) + "\n")
    assert set(told) == set(enumerate(MISTAKES.values(), HEADER.count("\n")))


def test_each_type_of_the_client_is_known_to_checkers(tmp_path: Path) -> None:
    report = run_pyright(tmp_path, "--ignoreexternal", "--verifytypes", "deconvd_client")
    completeness = report["typeCompleteness"]
    vague = [
        symbol
        for symbol in completeness["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"]
        # torch is not installed here; nobody imports the command's modules, whose types are click's
        if not symbol["name"].startswith(("deconvd_client.torch.", "deconvd_client.cli."))
    ]
    assert [(symbol["name"], symbol["diagnostics"]) for symbol in vague] == []
