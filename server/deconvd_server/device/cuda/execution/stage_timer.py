"""Times the stages of a call on the card by CUDA events, without a wait."""

from __future__ import annotations

from deconvd_server.call.ledger import Ledger, Stage
from deconvd_server.device.cuda.api.runtime import Event, Stream

__all__ = ["StageTimer"]

_STAGES = (Stage.UPLOAD, Stage.COMPUTE, Stage.DOWNLOAD)


class StageTimer:
    """Events around the stages of a call. They are read once the call's streams have been waited for.

        event 0 [ upload ] event 1 [ compute ] event 2 [ download ] event 3

    Where stages overlap, on streams of their own, a stage counts from the end of the one before it. If it ended before
    that, it has taken no time of its own.

    Args:
        stream: Where stages are, unless a method is given another stream.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._events = [Event(timing=True) for _ in range(len(_STAGES) + 1)]
        self._stages = [*zip(_STAGES, self._events, self._events[1:], strict=False)]

    def begin(self, stream: Stream | None = None, *, in_graph: bool = False) -> None:
        """Record where the first stage begins.

        Args:
            stream: The stage's stream, if it is not the timer's.
            in_graph: Whether it is being captured; then each launch of the graph records the event.
        """
        self._events[0].record((stream or self._stream).pointer, in_graph=in_graph)

    def end(self, stage: Stage, stream: Stream | None = None, *, in_graph: bool = False) -> None:
        """Record where a stage ends and the next one begins. Otherwise as `begin`."""
        event = self._events[_STAGES.index(stage) + 1]
        event.record((stream or self._stream).pointer, in_graph=in_graph)

    def record_stages(self, ledger: Ledger) -> None:
        """Add the stages' durations to a ledger. All events must be recorded, and the streams waited for."""
        ledger.add_all(
            [(stage, max(0.0, end.ms_since(begin)) / 1e3) for stage, begin, end in self._stages]
        )
