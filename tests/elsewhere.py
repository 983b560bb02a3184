"""The client on systems that have less than Linux: ``python -m tests.elsewhere [--as windows|macos]``.

It runs the tests that need no server of ours, on whatever system this is: all that client and contract can be tested by
where deconvd-server cannot run. With ``--as``, Python first loses what it does not have on that system.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LACKING", "TESTS", "pretend"]

TESTS = (
    "adaptive_backoff",
    "anywhere",
    "buffer_pool",
    "codec",
    "digest",
    "dtypes",
    "geometry",
    "lru",
    "messages",
    "operation",
    "options",
    "problem",
    "tensor",
)
"""Names of the test modules that need neither a server of ours nor anything of Linux."""

_NOT_ON_WINDOWS = (
    (os, "fork geteuid getgid getuid memfd_create pidfd_open preadv register_at_fork sched_getaffinity sysconf"),
    (select, "POLLIN epoll poll"),
    (signal, "SIGALRM SIGHUP SIGKILL SIGUSR1 SIGUSR2 pthread_kill pthread_sigmask setitimer"),
    (socket, "AF_UNIX MSG_CMSG_CLOEXEC MSG_DONTWAIT SO_PEERCRED recv_fds send_fds"),
)  # fmt: skip
_NOT_ON_MACOS = (
    (os, "memfd_create pidfd_open sched_getaffinity"),
    (select, "epoll"),
    (socket, "MSG_CMSG_CLOEXEC SO_PEERCRED"),
)

LACKING = {"windows": _NOT_ON_WINDOWS, "macos": _NOT_ON_MACOS}
"""What Linux has and each system lacks, as modules and names in them."""

_MODULES_NOT_ON_WINDOWS = ("fcntl", "grp", "pwd", "resource")


def pretend(system: str) -> None:
    """Take away what a system lacks, from this process. What is left is Linux's."""
    for module, names in LACKING[system]:
        for name in names.split():
            delattr(module, name)
    if system == "windows":
        _forbid_imports(_MODULES_NOT_ON_WINDOWS)


def _forbid_imports(modules: Sequence[str]) -> None:
    imported: dict[str, Any] = sys.modules
    imported.update(dict.fromkeys(modules))  # what is None there cannot be imported


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and return pytest's exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--as", dest="system", choices=LACKING)
    system, rest = parser.parse_known_args(arguments)
    import pytest

    if system.system is not None:
        pretend(system.system)
    _forbid_imports(("deconvd_server", "grpc_reflection"))  # whether installed or not
    tests = [str(Path(__file__).parent / f"test_{name}.py") for name in TESTS]
    # conftest's fixtures are those of servers; hypothesis's own profile "ci" asks for no speed either
    options = ["--noconftest", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
    return int(pytest.main([*options, *tests, *rest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
