"""A stock health client, as orchestrators have: it asks by one connection, and by a new one each time.

``python -m tests.soak.health health PATH PORT DIRECT_PORT SEED`` prints its `Check`s as JSON after SIGTERM.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deconvd.v1 import deconvd_pb2 as pb
from tests.soak.places import Interval, Places, end_at_sigterm

__all__ = ["Check"]

_TIMEOUT_S = 5.0
_PERIOD_S = 0.2


class Check(NamedTuple):
    """A question for health.

    Attributes:
        when: From its begin to its end.
        text: What came of it: SERVING if all is well.
        is_new: Whether it came by a new connection.
    """

    when: Interval
    text: str
    is_new: bool

    @classmethod
    def of(cls, when: list[float], text: str, is_new: bool) -> Check:
        """Return what was printed."""
        return cls((when[0], when[1]), text, is_new)


def _check(channel: grpc.Channel, is_new: bool) -> Check:
    service = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name
    began_s = time.monotonic()
    try:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_S)
        text = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    except grpc.RpcError as failure:
        call: Any = failure  # its stubs do not say so
        text = f"{call.code().name}: {call.details()}"
    return Check((began_s, time.monotonic()), text, is_new)


def main() -> None:
    """See the module."""
    _, *words, _ = sys.argv[1:]
    target = Places.of(*words).tcp
    alone = [("grpc.use_local_subchannel_pool", 1)]  # or gRPC would share the connection
    lasting = grpc.insecure_channel(target, alone)
    checks = []
    end = end_at_sigterm()
    while not end.wait(_PERIOD_S):
        checks.append(_check(lasting, is_new=False))
        if checks[-1].text != "SERVING":  # it would be a while before it connects again
            lasting.close()
            lasting = grpc.insecure_channel(target, alone)
        with grpc.insecure_channel(target, alone) as new:
            checks.append(_check(new, is_new=True))
    sys.stdout.write(json.dumps(checks))


if __name__ == "__main__":
    main()
