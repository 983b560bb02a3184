"""The elements of a striped call, as the service sees them. A transport carries them by several connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deconvd.model.dtypes import Array
from deconvd_server.device.arriving import ArrivalProgress

__all__ = ["StripedElements"]


class StripedElements(Protocol):
    """The operands of one striped call, which arrive, and its results, which leave while they are computed.

    Only the thread that serves the call may use it, except for `note_written`. If a connection of the call breaks, or
    its client breaks the rules, the call is stopped (`CallContext.stop`).
    """

    def receive_into(self, arrays: Sequence[Array]) -> ArrivalProgress:
        """Receive the operands into arrays, in the layout of `Tensor.raw`, and return their progress.

        To be called once. Until then nothing is received, so the arrays may be allocated as late as their memory is
        admitted.
        """

    def send_from(self, arrays: Sequence[Array]) -> None:
        """Send the results from arrays, in the layout of `Tensor.raw`. To be called once."""

    def note_written(self, index: int, size_bytes: int) -> None:
        """Note that the first bytes of a result are final. They leave from then on. Any thread may call this.

        Args:
            index: The result's place among the arrays of `send_from`.
            size_bytes: How many bytes. It never decreases.
        """

    def finish(self) -> None:
        """Wait until everything has been received and sent. Raises as `CallContext.check`."""

    def end(self) -> None:
        """Stop receiving and sending. Returns once no connection uses the arrays any more. May be called again."""
