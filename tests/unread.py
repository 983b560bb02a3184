"""A client that makes calls by gRPC and takes no answer: `python -m tests.unread TARGET COUNT MESSAGE`, in hex digits.

It says "sent" once the calls are made, and is to be stopped then.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from tests.environments import ROOT

__all__ = ["leave_calls_unread"]

_METHOD = "/deconvd.v1.DeconvolutionService/Deconvolve"


@contextmanager
def leave_calls_unread(target: str, count: int, message: bytes) -> Iterator[None]:
    """Have a client of its own make calls for the block, which does nothing from then on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unread", target, str(count), message.hex()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        process.send_signal(signal.SIGSTOP)
        yield
    finally:
        process.kill()
        process.communicate()


def _main(target: str, count: int, message: bytes) -> None:
    channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])
    grpc.channel_ready_future(channel).result(30)
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)
    calls = [call.future(message, timeout=300) for _ in range(count)]
    sys.stdout.write("sent\n")
    sys.stdout.flush()
    for answer in calls:
        answer.result()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
