"""Results of overlapped calls, which leave while their call is served.

    transport           gives the engine a `Departing` for each result that it sends before the call has ended
    Engine              passes them on if the device overlaps transfers; in the end it notes all bytes of each
    device              notes the first bytes of a result as soon as they are final

It is the counterpart of `arriving`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from deconvd.model.dtypes import Array
from deconvd_server.device.tensor import Tensor

__all__ = ["Departing", "Place", "note_all_written", "target_of", "targets_of"]


class Departing:
    """A result that is read while it is computed: an array in host memory that is written front to back.

    Bytes that were noted as written may be read at once. They stay as they are until the call has ended, but for one
    case: a call that is repeated, since operands took too long, may write the same results there again. Until a call
    has succeeded, its other bytes are arbitrary.

    Attributes:
        array: C-contiguous, in native byte order.
        written_bytes: How many of its first bytes are final.

    Args:
        on_written: Called with `written_bytes` whenever it has grown, in the thread that serves the call. It must not
            wait: the call may hold a device.
    """

    __slots__ = ("_on_written", "array", "written_bytes")

    def __init__(self, array: Array, on_written: Callable[[int], None]) -> None:
        if not (array.flags.c_contiguous and array.dtype.isnative):
            raise ValueError("a departing array must be C-contiguous and in native byte order")
        self.array = array
        self.written_bytes = 0
        self._on_written = on_written

    @property
    def is_written(self) -> bool:
        """Whether all of it is final."""
        return self.written_bytes == self.array.nbytes

    def note_written(self, size_bytes: int) -> None:
        """Note that its first `size_bytes` are final. Fewer than before change nothing."""
        if size_bytes > self.written_bytes:
            self.written_bytes = size_bytes
            self._on_written(size_bytes)


Place: TypeAlias = Tensor | Departing
"""Where a device writes a result: a tensor, or an array that is read meanwhile."""


def target_of(place: Place) -> Tensor:
    """Return the array of a departing result, or any other place as it is."""
    return place.array if isinstance(place, Departing) else place


def targets_of(places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return what `target_of` returns for each place, by field."""
    return {field: target_of(place) for field, place in places.items()}


def note_all_written(places: Iterable[object]) -> None:
    """Note that every departing one of the places is final."""
    for place in places:
        if isinstance(place, Departing):
            place.note_written(place.array.nbytes)
