"""Containers of a deconvd image, by docker or podman: with a read-only root, and without any privilege."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deconvd.host.startup_line import address_in_startup_line
from tests.servers import free_port

__all__ = ["Container", "Image"]

_TIMEOUT_S = 60
_HARDENED = (
    *("--read-only", "--tmpfs", "/tmp"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "host"),
)


@dataclass(frozen=True)
class Container:
    """A running server in a container, in this host's network.

    Attributes:
        process: The runner's, which ends with the container, and with its exit code.
        target: Where the server listens for TCP.
    """

    runner: Sequence[str]
    name: str
    process: subprocess.Popen[str]
    target: str

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, and return how it ended."""
        return _run([*self.runner, "exec", self.name, *command])

    def send_signal(self, name: str) -> None:
        """Send a signal to the server."""
        ended = _run([*self.runner, "kill", "--signal", name, self.name])
        assert ended.returncode == 0, ended.stderr

    def end(self) -> int:
        """Wait for the server's end, and return its exit code."""
        return self.process.wait(_TIMEOUT_S)


@dataclass(frozen=True)
class Image:
    """An image of deconvd-server.

    Attributes:
        runner: The command that runs containers, as its words.
        name: The image's name.
    """

    runner: Sequence[str]
    name: str

    def configuration(self) -> dict[str, Any]:
        """Return what the image says of how it is run: Labels, User, Healthcheck and so on."""
        ended = _run([*self.runner, "image", "inspect", self.name])
        assert ended.returncode == 0, ended.stderr
        (inspected,) = json.loads(ended.stdout)
        return {
            "Healthcheck": inspected.get("Healthcheck"),
            **inspected["Config"],
        }  # podman's is outside

    def run(self, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a container to its end, and return how it ended.

        Args:
            options: For the runner.
        """
        return _run([*self.runner, "run", "--rm", *_HARDENED, *options, self.name, *arguments])

    @contextmanager
    def serve(self, *arguments: str, keys: Path | None = None) -> Iterator[Container]:
        """Run a server on all addresses of this host for the block.

        Args:
            arguments: Of deconvd-server.
            keys: A folder that it sees as /keys.
        """
        name = f"deconvd-test-{uuid.uuid4()}"
        port = free_port()
        variables: Mapping[str, str] = {
            "DECONVD_LISTEN": f"0.0.0.0:{port} unix:/tmp/deconvd.sock",
            "DECONVD_DIRECT_PORT": "0",
        }
        options = [word for item in variables.items() for word in ("--env", "=".join(item))]
        if keys is not None:
            options += ["--volume", f"{keys}:/keys"]
        command = [*self.runner, "run", "--rm", "--name", name, *_HARDENED, *options, self.name]
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            assert address_in_startup_line(lines[0]) == f"0.0.0.0:{port}"
            yield Container(self.runner, name, process, f"127.0.0.1:{port}")
        finally:
            _run([*self.runner, "rm", "--force", name])
            process.communicate(timeout=_TIMEOUT_S)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
