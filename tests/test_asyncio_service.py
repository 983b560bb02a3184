"""The example of a service for asyncio: run as a program, it enlarges pictures, and cancels what nobody waits for."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deconvd_client
from deconvd_client import Connection
from examples.asyncio_service import decode
from examples.enlarge_photograph import enlarge
from tests.servers import ServerProcess, server_process, stop_server

IMAGE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


class RunningService:
    """The example, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.output = process.stdout
        self._port = int(self.output.readline().rpartition(":")[2].partition("/")[0])

    def begin(self, path: str, content: bytes) -> HTTPConnection:
        caller = HTTPConnection("127.0.0.1", self._port, timeout=60)
        caller.request("POST", path, content)
        return caller

    def post(self, path: str, content: bytes) -> tuple[int, bytes]:
        caller = self.begin(path, content)
        response = caller.getresponse()
        status, reply = response.status, response.read()
        caller.close()
        return status, reply


@contextmanager
def start_service(target: str) -> Iterator[RunningService]:
    command = [sys.executable, "-u", "-m", "examples.asyncio_service", "--port", "0"]
    with subprocess.Popen(
        [*command, "--target", target], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield RunningService(process)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def service(server: ServerProcess) -> Iterator[RunningService]:
    with start_service(server.target) as running:
        yield running


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("factor", [2, 4])
def test_callers_at_once_get_their_pictures(
    F: Connection, service: RunningService, factor: int
) -> None:
    images = [np.roll(IMAGE, shift, axis=0) for shift in range(4)]

    with ThreadPoolExecutor(len(images)) as callers:
        replies = list(callers.map(lambda image: service.post(f"/{factor}", png(image)), images))

    for image, (status, picture) in zip(images, replies, strict=True):
        assert status == 200
        np.testing.assert_array_equal(decode(picture), np.rint(enlarge(F, image, factor)))


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [("/9", png(IMAGE), b"/2 ... /8"), ("/2", b"no picture", b"cannot identify image file")],
)
def test_a_wrong_request_is_told_why(
    service: RunningService, path: str, content: bytes, reason: bytes
) -> None:
    status, reply = service.post(path, content)

    assert status == 400
    assert reason in reply


def test_a_caller_that_hangs_up_has_its_call_cancelled_and_others_are_served(
    tmp_path: Path,
) -> None:
    with server_process(tmp_path) as server, start_service(server.target) as service:
        assert service.post("/2", png(IMAGE))[0] == 200
        with stop_server(server):
            service.begin("/2", png(IMAGE)).close()
            assert service.output.readline() == "a caller hung up: its call is cancelled\n"
        assert service.post("/2", png(IMAGE))[0] == 200
        with deconvd_client.connect(server.target) as F:
            (device,) = F.server_info().devices
            assert (device.running_calls_count, device.waiting_calls_count) == (0, 0)
