"""A call's place in an admission, for the length of a block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from deconvd_server.call.context import CallContext
from deconvd_server.engine.place_clock import PlaceSpan

__all__ = ["AdmissionScope"]


class _Places(Protocol):
    """What an `Admission` does for the scope."""

    @property
    def has_wait_limit(self) -> bool: ...

    def enter(
        self,
        footprint_bytes: int,
        call: CallContext,
        lasting_bytes: int = 0,
        brought_bytes: int = 0,
        span: PlaceSpan | None = None,
    ) -> None: ...

    def leave(
        self, footprint_bytes: int, lasting_bytes: int = 0, span: PlaceSpan | None = None
    ) -> None: ...

    def end(self, lasting_bytes: int, peer: str) -> None: ...


class AdmissionScope(AbstractContextManager[None], PlaceSpan):
    """A call's place for the length of a block. See `Admission.admit`."""

    __slots__ = ("_admission", "_brought_bytes", "_footprint_bytes", "_lasting_bytes")

    def __init__(
        self,
        admission: _Places,
        call: CallContext,
        footprint_bytes: int,
        lasting_bytes: int,
        brought_bytes: int,
    ) -> None:
        # what `PlaceSpan` does, without another function on each call's way
        self.call = call
        self.cost_s = self.place_s = self.share_s = 0.0
        self.is_measured = admission.has_wait_limit and not call.is_accepted
        self._admission = admission
        self._footprint_bytes = footprint_bytes
        self._lasting_bytes = lasting_bytes
        self._brought_bytes = brought_bytes

    def __enter__(self) -> None:
        self._admission.enter(
            self._footprint_bytes, self.call, self._lasting_bytes, self._brought_bytes, self
        )
        if self._admission.has_wait_limit:
            self.call.is_accepted = True

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        admission, lasting_bytes = self._admission, self._lasting_bytes
        if exc_type is not None:
            self.is_measured = False  # it may have ended before its work
        admission.leave(self._footprint_bytes, lasting_bytes, self)
        if lasting_bytes:
            end = partial(admission.end, lasting_bytes, self.call.peer_key)
            if exc_type is None:
                self.call.on_end(end)
            else:
                end()
