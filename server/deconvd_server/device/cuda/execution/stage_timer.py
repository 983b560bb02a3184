"""Marks in a stream between the stages of a call: what each took is known once the stream has been waited for."""

from __future__ import annotations

from deconvd_server.call.ledger import Ledger, Stage
from deconvd_server.device.cuda.api.runtime import Event, Stream

__all__ = ["StageTimer"]

_STAGES = (Stage.UPLOAD, Stage.COMPUTE, Stage.DOWNLOAD)


class StageTimer:
    """Events on a stream: one before the first stage of a call, one behind each. They cost no wait.

    Where stages overlap, on streams of their own, each counts from the end of the one before it.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._events = [Event(timing=True) for _ in range(len(_STAGES) + 1)]
        self._stages = [*zip(_STAGES, self._events, self._events[1:], strict=False)]

    def begin(self, stream: Stream | None = None, *, in_graph: bool = False) -> None:
        """Mark where the first stage begins.

        Args:
            stream: Where, if not on the stream of all others.
            in_graph: Whether that is being captured: each launch of the graph marks anew.
        """
        self._events[0].record((stream or self._stream).pointer, in_graph=in_graph)

    def end(self, stage: Stage, stream: Stream | None = None, *, in_graph: bool = False) -> None:
        """Mark where a stage ends, and the next begins. Otherwise as `begin`."""
        event = self._events[_STAGES.index(stage) + 1]
        event.record((stream or self._stream).pointer, in_graph=in_graph)

    def record_stages(self, ledger: Ledger) -> None:
        """Count what each stage took. All must be marked, and the streams have been waited for."""
        ledger.add_all([(stage, end.ms_since(begin) / 1e3) for stage, begin, end in self._stages])
