"""The tensors of one call, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType

from google.protobuf.message import Message

from deconvd.codec import Buffer
from deconvd.errors import StaleRegionError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, array_from_message, spec_from_message
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.shared_memory.lender import Lender

__all__ = ["CallTensors"]


class CallTensors:
    """The tensors of one call: those in shared memory stay mapped until the block ends.

    Args:
        lender: Whose memory they may be in; None if there is none.
    """

    def __init__(self, lender: Lender | None) -> None:
        self._lender = lender
        self._used = ExitStack()

    def operand(self, name: str, message: pb.Tensor, raw: Buffer | None) -> Array:
        """Return a tensor of a request, as a read-only array.

        Args:
            name: Name of the argument, for errors.
            raw: Its elements, where `deconvd.codec` has taken them out of the message.

        Raises:
            InvalidArgumentError: As `array_from_message` and `Lender.tensor` do.
        """
        if message.WhichOneof("payload") != "shared":
            return array_from_message(name, message, raw)
        array = self.place(name, message.shared, spec_from_message(name, message))
        array.flags.writeable = False
        return array

    def places(self, request: Message, results: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """Return where results are to be put, those that have a place: writable arrays, by field.

        Args:
            request: Has a field ``{name}_place`` for each result.
            results: What they will be, by the names of their fields.

        Raises:
            InvalidArgumentError: As `Lender.tensor` does.
        """
        names = {field: f"{field}_place" for field in results}
        return {
            field: self.place(name, getattr(request, name), results[field])
            for field, name in names.items()
            if request.HasField(name)
        }

    def __enter__(self) -> CallTensors:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._used.close()

    def place(self, name: str, shared: pb.SharedSlice, spec: TensorSpec) -> Array:
        """Return a slice of memory as a writable array.

        Args:
            name: What it is for, for errors.

        Raises:
            InvalidArgumentError: As `Lender.tensor` does.
        """
        if self._lender is None:
            raise StaleRegionError(
                f"{name} must be sent in messages: this server lends no memory", argument=name
            )
        return self._used.enter_context(self._lender.tensor(name, shared, spec))
