"""The resident tensors of one call: those that its request names, and those that it makes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from deconvd.errors import ExhaustedError, InvalidArgumentError, LostTensorError
from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.digest import DIGEST_BYTES
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.device.pieces import pieces
from deconvd_server.engine.engine import Engine
from deconvd_server.residents.entry import ResidentEntry
from deconvd_server.residents.registry import ResidentRegistry
from deconvd_server.residents.tenant import Session
from deconvd_server.resources.capabilities import new_name

__all__ = ["CallResidents"]


class CallResidents:
    """The resident tensors of one call, by the field of the request or response that they are for.

    The call counts as a user of each of them until `release`. Only the thread of the call may use this.

    Attributes:
        handles: The handles of new tensors, by field. They stand for the tensors once `commit` has been called.
    """

    def __init__(self, registry: ResidentRegistry, session: Session, call: CallContext) -> None:
        self.handles: dict[str, bytes] = {}
        self._registry = registry
        self._session = session
        self._call = call
        self._by_field: dict[str, ResidentEntry] = {}
        self._use = registry.begin_use(call)

    def __contains__(self, field: str) -> bool:
        return field in self._by_field

    def find(self, field: str, spec: TensorSpec, message: pb.Tensor) -> None:
        """Find the resident operand that a message names.

        Raises:
            InvalidArgumentError: The tensor has another shape or element type, or the digest does not fit `spec`.
            LostTensorError: No tensor of this tenant has the handle or the digest.
        """
        argument = ARGUMENTS[field]
        if message.HasField("digest"):
            _check_digest(argument, spec, message.digest)
            if not self.find_content(field, spec, message.digest):
                raise LostTensorError(
                    f"{argument} must be sent: the server has nothing with its digest",
                    argument=argument,
                )
            return
        handle = message.resident.handle
        entry = self._registry.acquire_by_name(self._session, handle, argument, self._call)
        self._by_field[field] = self._track(entry)
        if entry.spec != spec:
            raise InvalidArgumentError(
                f"{argument} must have the shape and element type of the resident tensor, {entry.spec}, "
                f"got {spec}",
                argument=argument,
            )

    def find_content(self, field: str, spec: TensorSpec, digest: pb.Digest) -> bool:
        """Find a resident operand by its content; return whether the tenant has it."""
        key = _content_key(digest, spec)
        entry = self._registry.acquire_by_content(self._session, key, self._call)
        if entry is not None:
            self._by_field[field] = self._track(entry)
        return entry is not None

    def preferred_engine(self) -> Engine | None:
        """Return the engine whose device has most bytes of the call's residents; None if no device has any."""
        bytes_on: dict[Engine, int] = {}
        for entry in self._use.tensors:
            engine = entry.tier.engine
            if engine is not None:
                bytes_on[engine] = bytes_on.get(engine, 0) + entry.spec.nbytes
        return max(bytes_on, key=bytes_on.__getitem__, default=None)

    def make(self, field: str, spec: TensorSpec, engine: Engine) -> DeviceTensor:
        """Return a new tensor on an engine's device, with a handle. Raises as `ResidentRegistry.make`."""
        entry = self._by_field[field] = self._make(spec, engine)
        self.give_handle(field)
        return entry.device_tensor

    def copy(self, field: str, tensor: Tensor, engine: Engine, brought_bytes: int = 0) -> None:
        """Make a tensor on an engine's device with the elements of another tensor.

        If the other tensor is on a device, it is copied through host memory, a piece at a time.

        Args:
            brought_bytes: See `Engine.write`.

        Raises as `make` and `Engine.write` do.
        """
        if isinstance(tensor, np.ndarray):
            entry = self._make(TensorSpec(tensor.shape, tensor.dtype), engine)
            engine.write(entry.device_tensor, tensor, self._call, brought_bytes=brought_bytes)
        else:
            entry = self._make(tensor.spec, engine)
            for source, target in zip(pieces(tensor), pieces(entry.device_tensor), strict=True):
                engine.write(target, engine.read(source, self._call), self._call)
        self._by_field[field] = entry

    def register_content(self, field: str, digest: pb.Digest) -> None:
        """Let the tenant's later calls name a tensor by its digest."""
        entry = self._by_field[field]
        self._registry.register_content(entry, self._session, _content_key(digest, entry.spec))

    def give_handle(self, field: str) -> None:
        """Give a tensor a new handle."""
        self.handles[field] = new_name()

    def operand(self, field: str, engine: Engine) -> Tensor:
        """Return a tensor where an engine can use it. This may copy it: see `ResidentRegistry.operand`."""
        return self._registry.operand(self._by_field[field], engine, self._call)

    def commit(self) -> None:
        """Let the new handles stand for their tensors until the session ends.

        Raises:
            LostSessionError: The session has ended.
            ExhaustedError: A tensor has as many handles as it may. Then none of the new handles stands for a tensor.
        """
        try:
            for field, handle in self.handles.items():
                self._registry.bind_name(self._by_field[field], self._session, handle)
        except ExhaustedError:
            self._registry.drop(self._session, self.handles.values())
            raise

    def release(self) -> None:
        """Stop using the tensors."""
        self._registry.end_use(self._use)

    def _make(self, spec: TensorSpec, engine: Engine) -> ResidentEntry:
        return self._track(self._registry.make(self._session, spec, engine, self._call))

    def _track(self, entry: ResidentEntry) -> ResidentEntry:
        """Note that `release` must release a tensor."""
        self._use.tensors.append(entry)
        return entry


def _check_digest(argument: str, spec: TensorSpec, digest: pb.Digest) -> None:
    if len(digest.blake3) != DIGEST_BYTES or digest.size_bytes != spec.nbytes:
        raise InvalidArgumentError(
            f"{argument} must have a BLAKE3 digest of {DIGEST_BYTES} bytes and a size_bytes of {spec.nbytes} "
            f"for {spec}, got a digest of {len(digest.blake3)} bytes and a size_bytes of {digest.size_bytes}",
            argument=argument,
        )


def _content_key(digest: pb.Digest, spec: TensorSpec) -> Hashable:
    return digest.blake3, spec
