"""The tensors of one call: where its operands come from, and where its results go."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import Final

import numpy as np

from deconvd.codec import Buffer
from deconvd.digest import DIGEST_BYTES, digest_of
from deconvd.errors import (
    ExhaustedError,
    InvalidArgumentError,
    LostTensorError,
    UnavailableError,
)
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, array_of_spec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.call import Call
from deconvd_server.device import DeviceTensor, Operand
from deconvd_server.engine import Engine, Engines
from deconvd_server.requests import Deconvolution, Differentiation
from deconvd_server.residents import Kept, Residents, Session
from deconvd_server.secret_names import new_name
from deconvd_server.shared_memory import CallTensors, Lender

__all__ = ["Exchange", "argument_of"]

_ARGUMENTS: Final = {"w": "W"}
"""What fields are called in Python, where that is otherwise."""


def argument_of(field: str) -> str:
    """Return the name of the argument that a field of a request is for."""
    return _ARGUMENTS.get(field, field)


class Exchange:
    """The tensors of one call, from its request to its response; to be used as a context.

    First `take` or `find`, then `settle` on an engine; then `operand`s and `place`s are where that
    engine can use them. What is to be kept is good once `commit` is called. At the end of the block
    everything is given back.

    Args:
        request: The call's message, without elements.
        asked: What it asks for.
        lender: Whose memory tensors may lie in; None if there is none.
        residents: Where tensors may be kept.
    """

    def __init__(
        self,
        request: pb.DeconvolveRequest | pb.DeconvolveGradRequest,
        asked: Deconvolution | Differentiation,
        lender: Lender | None,
        residents: Residents,
        call: Call,
    ) -> None:
        self._request = request
        self._asked = asked
        self._shared = CallTensors(lender)
        self._residents = residents
        self._keeper = residents.keeper
        self._call = call
        self._known_session: Session | None = None
        self._engine: Engine | None = None
        self._given: dict[str, Operand] = {}
        self._kept: dict[str, Kept] = {}
        self._used: list[Kept] = []
        self._names: dict[str, bytes] = {}
        self._places: dict[str, Operand] = {}

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for kept in self._used:
            self._keeper.release(kept)
        self._shared.__exit__(exc_type, exc, traceback)

    @property
    def operands(self) -> dict[str, TensorSpec]:
        """What the operands are, by the names of their fields, in the order in which they stream."""
        return self._asked.operands

    # From the request

    def take(self, raw: Mapping[str, Buffer]) -> None:
        """Take all operands of a message, and the places of its results.

        Args:
            raw: Elements, by the names of their fields.

        Raises:
            InvalidArgumentError: As `CallTensors.operand` and `array_of_spec` do.
            NotFoundError: Something that the request names is not there.
        """
        slices = self._asked.slices
        for field, spec in self._asked.operands.items():
            argument = argument_of(field)
            if field in slices:
                self._given[field] = self._shared.operand(argument, spec, slices[field])
                continue
            tensor = getattr(self._request, field)
            if field in raw or not self._find(field, argument, tensor):
                self._given[field] = array_of_spec(argument, spec, tensor, raw.get(field))
        for field, spec in self._asked.results.items():
            if field in slices:
                self._places[field] = self._shared.place(f"{field}_place", spec, slices[field])

    def find(self) -> dict[str, TensorSpec]:
        """Find the operands of a stream that are here already; return what is missing of the others.

        Those are the ones given by digest, by the names of their fields, in the stream's order.

        Raises:
            InvalidArgumentError: An operand has elements in the header.
            NotFoundError: Something that the request names is not there.
        """
        missing = {}
        for field, spec in self._asked.operands.items():
            tensor = getattr(self._request, field)
            argument = argument_of(field)
            payload = tensor.WhichOneof("payload")
            if payload in ("raw", "shared"):
                raise InvalidArgumentError(
                    f"{argument} must have its elements behind a stream's header, or be on the "
                    f"server, got them as {payload}",
                    argument=argument,
                )
            if payload == "digest" and not self._find_content(field, argument, tensor):
                missing[field] = spec
            elif payload == "resident":
                self._find(field, argument, tensor)
        return missing

    def take_missing(self, arrays: Mapping[str, Array]) -> None:
        """Take what was missing, and keep it for its digest if there is room.

        Raises:
            InvalidArgumentError: It is not what its digest says.
        """
        for field, array in arrays.items():
            digest = getattr(self._request, field).digest
            if digest_of(array) != digest:
                argument = argument_of(field)
                raise InvalidArgumentError(
                    f"{argument} must be what its digest says, and its elements have another",
                    argument=argument,
                )
            self._given[field] = array
            try:
                kept = self._kept_copy(array)
            except (ExhaustedError, UnavailableError):
                continue  # it serves this call from where it is
            self._keeper.offer(kept, self._session, _content_key(digest, kept.spec))
            self._kept[field] = kept

    # On an engine

    def settle(self, engines: Engines) -> Engine:
        """Return the engine to work on.

        That is the one on whose card the client has tensors, else where most of the bytes are that
        are kept, or else the least loaded.

        Raises:
            InvalidArgumentError: The client has tensors on several cards.
            ExhaustedError, UnavailableError, LostSessionError: What is to be kept cannot be.
        """
        nearest = self._nearest() if self._used else None
        on_card = engines.having(*self._given.values(), *self._places.values())
        self._engine = on_card or nearest or engines.least_loaded()
        for field in self._asked.keep:
            if field in self._asked.results:
                self._make(field, self._asked.results[field])
        return self._engine

    def operand(self, field: str) -> Operand:
        """Return an operand that was taken or found, where the engine can use it; kept if it is to be."""
        kept = self._kept.get(field)
        if kept is None:
            given = self._given[field]
            if field not in self._asked.keep:
                return given
            if not isinstance(given, np.ndarray):
                given = self._settled.read(given, self._call)
            kept = self._kept[field] = self._kept_copy(given)
        if field in self._asked.keep and not self._is_resident(field):
            self._names[field] = new_name()
        return self._keeper.operand(kept, self._settled, self._call)

    def has(self, field: str) -> bool:
        """Return whether an operand was taken or found."""
        return field in self._kept or field in self._given

    def tensor_for(self, field: str) -> DeviceTensor | None:
        """Return a tensor on the engine's device for an operand that has yet to come; None if it is not kept."""
        if field not in self._asked.keep:
            return None
        return self._make(field, self._asked.operands[field])

    def tensor_of(self, field: str) -> DeviceTensor | None:
        """Return the tensor on the engine's device for a result; None if it is not kept."""
        kept = self._kept.get(field)
        return None if kept is None else kept.device_tensor

    def place(self, field: str) -> Operand | None:
        """Return where a result is to be put; None if it is to be sent."""
        tensor = self.tensor_of(field)
        return self._places.get(field) if tensor is None else tensor

    # To the response

    def commit(self) -> None:
        """Let the names of what is kept stand for it, until the session ends.

        Raises:
            LostSessionError: It has ended.
        """
        for field, name in self._names.items():
            self._keeper.name(self._kept[field], self._session, name)

    def described(self, field: str) -> pb.Tensor:
        """Return the message of a result, without elements."""
        described = self._asked.described[field]
        if field not in self._names:
            return described
        message = pb.Tensor()
        message.CopyFrom(described)
        message.resident.handle = self._names[field]
        return message

    def kept_operands(self) -> pb.KeptOperands | None:
        """Return the names of the operands that are kept; None if none is."""
        if not self._names:
            return None
        residents = {
            field: pb.Resident(handle=name)
            for field, name in self._names.items()
            if field in self._asked.operands
        }
        return pb.KeptOperands(**residents) if residents else None

    # What is kept

    @property
    def _session(self) -> Session:
        """The request's session. Raises as `Sessions.get`."""
        if self._known_session is None:
            self._known_session = self._residents.sessions.get(self._request.session)
            self._call.tenant = self._known_session.tenant
        return self._known_session

    @property
    def _settled(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("no engine was settled on")
        return self._engine

    def _is_resident(self, field: str) -> bool:
        is_resident: bool = getattr(self._request, field).HasField("resident")
        return is_resident

    def _find(self, field: str, argument: str, tensor: pb.Tensor) -> bool:
        """Find an operand that a message names; return False if the message has it itself."""
        payload = tensor.WhichOneof("payload")
        if payload == "resident":
            self._find_resident(field, argument, tensor)
            return True
        if payload == "digest":
            if not self._find_content(field, argument, tensor):
                raise LostTensorError(
                    f"{argument} must be sent: the server has nothing with its digest",
                    argument=argument,
                )
            return True
        return False

    def _find_resident(self, field: str, argument: str, tensor: pb.Tensor) -> None:
        handle, session = tensor.resident.handle, self._session
        kept = self._using(self._keeper.by_name(session, handle, argument, self._call))
        spec = self._asked.operands[field]
        if kept.spec != spec:
            raise InvalidArgumentError(
                f"{argument} must have the shape and element type that it was kept with, "
                f"{kept.spec}, got {spec}",
                argument=argument,
            )
        self._kept[field] = kept

    def _find_content(self, field: str, argument: str, tensor: pb.Tensor) -> bool:
        digest, spec = tensor.digest, self._asked.operands[field]
        if len(digest.blake3) != DIGEST_BYTES or digest.size_bytes != spec.nbytes:
            raise InvalidArgumentError(
                f"{argument} must have a digest of {DIGEST_BYTES} bytes, of {spec.nbytes} bytes for "
                f"{spec}, got one of {len(digest.blake3)} bytes, of {digest.size_bytes} bytes",
                argument=argument,
            )
        key = _content_key(digest, spec)
        kept = self._keeper.by_content(self._session, key, self._call)
        if kept is None:
            return False
        self._kept[field] = self._using(kept)
        return True

    def _nearest(self) -> Engine | None:
        """Return the engine on whose device most of the bytes are of what was found; None if none are."""
        bytes_on: dict[Engine, int] = {}
        for kept in self._used:
            engine = kept.shelf.engine
            if engine is not None:
                bytes_on[engine] = bytes_on.get(engine, 0) + kept.spec.nbytes
        return max(bytes_on, key=bytes_on.__getitem__, default=None)

    def _make(self, field: str, spec: TensorSpec) -> DeviceTensor:
        """Return a new tensor on the engine's device, which is to be kept."""
        made = self._keeper.make(self._session, spec, self._settled, self._call)
        kept = self._kept[field] = self._using(made)
        self._names[field] = new_name()
        return kept.device_tensor

    def _kept_copy(self, array: Array) -> Kept:
        spec = TensorSpec(array.shape, array.dtype)
        made = self._keeper.make(self._session, spec, self._settled, self._call)
        kept = self._using(made)
        self._settled.write(kept.device_tensor, array, self._call)
        return kept

    def _using(self, kept: Kept) -> Kept:
        """Note that a tensor is to be released at the end."""
        self._used.append(kept)
        return kept


def _content_key(digest: pb.Digest, spec: TensorSpec) -> Hashable:
    return digest.blake3, spec
