"""Every RPC of a real server, made by stock grpcio with damaged messages."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import grpc

from tests.fuzz.case import Case, Seed
from tests.fuzz.requests import HANDLE, REQUESTS, SERVICE, SESSION
from tests.fuzz.served import ServerTarget, hold_names

__all__ = ["Rpcs"]

_OF_THE_CONTRACT = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_ENOUGH_RESPONSES = 4
"""After which a stream is cancelled: what is asked for may be very large."""


class Rpcs(ServerTarget):
    """All RPCs. Each must end well, or with a status that the schema documents."""

    # each session takes as long as a hundred other calls
    seeds = tuple(
        Seed(name, parts)
        for name, parts in REQUESTS.items()
        for _ in range(1 if name == "HoldSession" else 4)
    )
    batch_count = 200
    limit_s = 40.0
    bounded_count = 300
    share = 2

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        self._session, self._handle = stack.enter_context(hold_names(self.server.target))
        self._channel = stack.enter_context(grpc.insecure_channel(self.server.target))

    def feed(self, case: Case) -> None:
        parts = [
            part.replace(SESSION, self._session).replace(HANDLE, self._handle)
            for part in case.parts
        ]
        code = self._call(case.kind, parts)
        assert code in _OF_THE_CONTRACT, f"{case.kind} ended with {code}"

    def _call(self, name: str, parts: list[bytes]) -> grpc.StatusCode:
        """Return how a call ends, or OK where it is cut because it answers at length."""
        # on the wire a call of one message is a stream of one
        rpc: Any = self._channel.stream_stream(f"/{SERVICE.full_name}/{name}")
        responses = rpc(iter(parts), timeout=30)
        try:
            for count, _ in enumerate(responses, 1):
                if count == _ENOUGH_RESPONSES:
                    responses.cancel()
                    return grpc.StatusCode.OK
        except grpc.RpcError:
            pass
        code: grpc.StatusCode = responses.code()
        return code
