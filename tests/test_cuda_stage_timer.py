"""Times of stages by the card's clock."""

from __future__ import annotations

import pytest

from deconvd_server.call.ledger import Ledger, Stage
from deconvd_server.device.cuda.api.runtime import Stream
from deconvd_server.device.cuda.execution.stage_timer import StageTimer

pytestmark = pytest.mark.gpu


def test_a_stage_that_ended_before_the_one_before_it_has_taken_no_time() -> None:
    """Streams that run side by side end their stages in any order. A negative time is no entry of a ledger."""
    stream, ledger = Stream(), Ledger()
    timer = StageTimer(stream)

    timer.begin()
    for stage in (Stage.DOWNLOAD, Stage.COMPUTE, Stage.UPLOAD):
        timer.end(stage)
        stream.wait()
    timer.record_stages(ledger)

    assert ledger.times_us[Stage.UPLOAD] > 0
    assert ledger.times_us[Stage.COMPUTE] == 0
    assert ledger.times_us[Stage.DOWNLOAD] == 0
