"""The client against a server with TLS whose bytes are damaged on the way: it fails in time, or is answered right."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, Final

import numpy as np
import pytest

import deconvd_client
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import DeconvdError
from deconvd_client.credentials import Credentials
from deconvd_client.transports.direct.connectors import TcpConnector
from tests.certificates import CertificateFiles
from tests.direct_calls import W, X, is_serving
from tests.fuzz.case import Case, Seed
from tests.fuzz.certificates import Signer, unsigned_certificates
from tests.fuzz.edits import EDITS, apply_edits
from tests.fuzz.frames import TOKEN
from tests.fuzz.target import Target
from tests.processes import process_resources, wait_until
from tests.tls_servers import NamedTokens, secured_server

__all__ = ["TlsClients"]

_TIMEOUT_S: Final = 0.3
_FIRST_TIMEOUT_S: Final = 30.0
"""That of undamaged calls at first, which must get through on a busy machine."""

_SPARE_BYTES: Final = 200 << 20
_PIECES_COUNT: Final = 4


def _seeds() -> Iterator[Seed]:
    """Yield scripts of edits: of the server's first piece, its second one, and so on."""
    for kind, every in (("direct", 3), ("direct 1.2", 3), ("grpc", 12)):
        for place in range(_PIECES_COUNT):
            for script in EDITS[place::every]:
                parts = [script if place == number else b"" for number in range(_PIECES_COUNT)]
                yield Seed(kind, parts, is_list=False)


class TlsClients(Target):
    """Direct connections and channels, by a proxy that damages what the server sends."""

    seeds = (*_seeds(),)
    batch_count = 100
    limit_s = 8.0
    bounded_count = 30
    share = 1

    def open(self, stack: ExitStack) -> None:
        self._strays: list[Any] = []
        signer = Signer(self.directory)
        cert = signer.sign(unsigned_certificates()[1])
        self._tls = signer.tls(cert)
        self._server = stack.enter_context(
            secured_server(
                CertificateFiles(cert, signer.key),
                client_ca=signer.ca,
                tokens=NamedTokens({TOKEN: "fuzz"}),
            )
        )
        direct = self._server.address
        host, _, port = self._server.target.rpartition(":")
        self._proxies = {
            "direct": stack.enter_context(_EditingProxy(direct)),
            "grpc": stack.enter_context(_EditingProxy((host, int(port)))),
        }
        self._credentials = Credentials(lambda: TOKEN, self._tls)
        self._older = Credentials(lambda: TOKEN, self._tls)
        state = self._older.tls_state
        assert state is not None
        state.context.maximum_version = state.context.minimum_version
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(threading, "excepthook", lambda stray: self._strays.append(stray.exc_value))
        patch.setattr(sys, "unraisablehook", lambda stray: self._strays.append(stray.exc_value))
        for kind in ("direct", "direct 1.2", "grpc"):
            self._call(kind, (), _FIRST_TIMEOUT_S)
        self._before = process_resources(os.getpid())

    def feed(self, case: Case) -> None:
        with suppress(DeconvdError, OSError):
            self._call(case.kind, case.parts, _TIMEOUT_S)

    def _call(self, kind: str, scripts: tuple[bytes, ...], timeout_s: float) -> None:
        """Make a call. Raises DeconvdError or OSError if it does not get through, and AssertionError if it is wrong."""
        way = kind.split()[0]
        proxy = self._proxies[way]
        proxy.scripts = scripts
        if way == "grpc":
            with deconvd_client.connect(
                proxy.target,
                tls=self._tls,
                token=TOKEN,
                transport="grpc",
                timeout_s=timeout_s,
                fail_fast=True,
            ) as F:
                np.testing.assert_array_equal(F.deconvolution_2d(X, W), self._right_result())
            return
        info = pb.GetServerInfoResponse()
        info.CopyFrom(self._server.info())
        info.direct_port = proxy.port
        credentials = self._older if kind.endswith("1.2") else self._credentials
        with TcpConnector("127.0.0.1", credentials).connect(lambda: info, timeout_s) as stream:
            stream.set_deadline(timeout_s)
            assert is_serving(stream)

    def _right_result(self) -> np.ndarray[Any, Any]:
        y = np.zeros((1, 2, 4, 4), np.float32)
        for i in range(2):
            for j in range(2):
                y[:, :, i : i + 3, j : j + 3] += X.sum(1, keepdims=True)
        return y

    def check(self) -> None:
        if self._strays:
            raise self._strays.pop()
        for kind in ("direct", "grpc"):
            self._call(kind, (), _FIRST_TIMEOUT_S)
        wait_until(self._has_given_back)

    def _has_given_back(self) -> bool:
        before, now = self._before, process_resources(os.getpid())
        return (
            now.memory_bytes <= before.memory_bytes + _SPARE_BYTES
            and now.threads_count <= before.threads_count + 16
            and now.descriptors_count <= before.descriptors_count + 16
        )


class _EditingProxy:
    """Passes on what it gets, and edits what the server sends: each piece by the next script. A context manager.

    Attributes:
        scripts: Those for the connections to come.
        port, target: Where clients find it.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.scripts: tuple[bytes, ...] = ()
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> _EditingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near, self.scripts), daemon=True).start()

    def _serve(self, near: socket.socket, scripts: tuple[bytes, ...]) -> None:
        """Pass on what both ends of a connection send."""
        with near, socket.create_connection(self._address, 30) as far:
            up = threading.Thread(target=_pass_on, args=(near, far, ()), daemon=True)
            up.start()
            _pass_on(far, near, scripts)
            up.join()


def _pass_on(source: socket.socket, target: socket.socket, scripts: tuple[bytes, ...]) -> None:
    """Pass on what one end sends, until it ends; then the other has nothing more to wait for."""
    rest = [*scripts]
    with suppress(OSError):  # one has gone
        while data := source.recv(1 << 16):
            target.sendall(apply_edits(data, rest.pop(0) if rest else b""))
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
