"""How many stripes a server grants to each call: those of all calls share its processors."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from deconvd_server.call.context import CallContext
from deconvd_server.transports.direct import transfers
from deconvd_server.transports.direct.transfers import TransferTable


@pytest.mark.parametrize(
    ("processors_count", "limits"),
    [
        (2, [2, 2, 2]),
        (8, [4, 2, 2]),
        (16, [8, 4, 2, 2, 2, 2, 2, 2]),
        (64, [8, 8, 8, 8, 6, 5, 4, 4, 3]),
    ],
)
def test_calls_share_the_processors(
    processors_count: int, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "processors_count", lambda: processors_count)
    table = TransferTable(lambda: None)
    alone = table.stripes_limit
    with ExitStack() as calls:
        found = []
        for number in range(len(limits)):
            call = CallContext(60, "peer", "peer")
            calls.callback(call.end)
            calls.enter_context(table.open(bytes([number]) * 16, "peer", 2, call))
            found.append(table.stripes_limit)
        assert found == limits
    assert table.stripes_limit == alone == limits[0]
