"""The processes of clients, and what befalls them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

__all__ = ["Client", "Hostile"]


class Client:
    """A client's process, and the files that it writes to.

    Args:
        module: What it runs, with `words`.
    """

    def __init__(self, directory: Path, name: str, module: str, *words: object) -> None:
        self.name = name
        self.out, self._errors = directory / f"{name}.out", directory / f"{name}.err"
        command = [sys.executable, "-m", f"tests.soak.{module}", *map(str, words)]
        with self.out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors
            )

    @property
    def is_ready(self) -> bool:
        """Whether it has begun."""
        return self.out.stat().st_size > 0

    @property
    def report(self) -> str:
        """What it said at the end."""
        return self.out.read_text().partition("\n")[2]

    def fault(self, timeout_s: float) -> str:
        """Wait for its end, and return what was wrong with it; empty if nothing was."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return f"{self.name} did not end"
        return "" if code in (0, -signal.SIGKILL) else f"{self.name} failed: {self._last_line()}"

    def end(self) -> None:
        """Kill it, if it has not ended."""
        self.process.kill()
        self.process.wait()

    def _last_line(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


class Hostile(Client):
    """A hostile client, which is stopped, continued and killed at random.

    Args:
        seconds: How long it attacks at most.
    """

    def __init__(
        self, directory: Path, name: str, kind: str, *words: object, random: Random, seconds: float
    ) -> None:
        super().__init__(directory, name, "hostile", kind, *words, random.random())
        self.kind = kind
        stop_s, kill_s = random.uniform(0, seconds), random.uniform(seconds / 2, seconds)
        signals = [(stop_s, signal.SIGSTOP), (stop_s + random.random(), signal.SIGCONT)]
        self._signals = sorted([*signals, (kill_s, signal.SIGKILL)])
        self._began_s = 0.0

    def tend(self) -> None:
        """Send it the signals that are due since it began."""
        if not self._began_s and self.is_ready:
            self._began_s = time.monotonic()
        while self._began_s and self._signals:
            due_s, number = self._signals[0]
            if time.monotonic() < self._began_s + due_s:
                return
            self.process.send_signal(number)
            self._signals.pop(0)

    @property
    def attacks_count(self) -> int:
        """How often it began to attack."""
        return self.report.count("an attack\n")
