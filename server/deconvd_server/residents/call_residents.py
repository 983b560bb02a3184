"""The tensors of one call that stay on the server: those that it finds there, and those that it makes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from deconvd.errors import ExhaustedError, InvalidArgumentError
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
    """The tensors of one call that stay for its session, by the fields that they are for.

    The call is their user until it calls `release`.

    Attributes:
        handles: New names, by field: good once `commit` is called.
    """

    def __init__(self, keeper: ResidentRegistry, session: Session, call: CallContext) -> None:
        self.handles: dict[str, bytes] = {}
        self._registry = keeper
        self._session = session
        self._call = call
        self._by_field: dict[str, ResidentEntry] = {}
        self._use = keeper.begin_use(call)

    def __contains__(self, field: str) -> bool:
        return field in self._by_field

    def find(self, field: str, spec: TensorSpec, message: pb.Tensor) -> bool:
        """Find an operand that a message names; return False if that is by its content, which is not here.

        Raises:
            InvalidArgumentError: It is of another form, or its digest is none of such a tensor.
            LostTensorError: There is no tensor with its handle.
        """
        argument = ARGUMENTS[field]
        if message.HasField("resident"):
            handle = message.resident.handle
            kept = self._registry.acquire_by_name(self._session, handle, argument, self._call)
        else:
            _check_digest(argument, spec, message.digest)
            key = _content_key(message.digest, spec)
            found = self._registry.acquire_by_content(self._session, key, self._call)
            if found is None:
                return False
            kept = found
        self._by_field[field] = self._track(kept)
        if kept.spec != spec:
            raise InvalidArgumentError(
                f"{argument} must have the shape and element type that it was kept with, "
                f"{kept.spec}, got {spec}",
                argument=argument,
            )
        return True

    def preferred_engine(self) -> Engine | None:
        """Return the engine on whose device most of the bytes are of what is used; None if none are."""
        bytes_on: dict[Engine, int] = {}
        for kept in self._use.tensors:
            engine = kept.tier.engine
            if engine is not None:
                bytes_on[engine] = bytes_on.get(engine, 0) + kept.spec.nbytes
        return max(bytes_on, key=bytes_on.__getitem__, default=None)

    def make(self, field: str, spec: TensorSpec, engine: Engine) -> DeviceTensor:
        """Return a new tensor on an engine's device, with a handle. Raises as `Keeper.make`."""
        kept = self._by_field[field] = self._make(spec, engine)
        self.give_handle(field)
        return kept.device_tensor

    def copy(self, field: str, tensor: Tensor, engine: Engine, brought_bytes: int = 0) -> None:
        """Make a tensor on an engine's device with another's elements, by way of the host if that is on a device.

        Args:
            brought_bytes: See `Engine.write`.

        Raises as `make` and `Engine.write` do.
        """
        if isinstance(tensor, np.ndarray):
            kept = self._make(TensorSpec(tensor.shape, tensor.dtype), engine)
            engine.write(kept.device_tensor, tensor, self._call, brought_bytes=brought_bytes)
        else:
            kept = self._make(tensor.spec, engine)
            for source, target in zip(pieces(tensor), pieces(kept.device_tensor), strict=True):
                engine.write(target, engine.read(source, self._call), self._call)
        self._by_field[field] = kept

    def register_content(self, field: str, digest: pb.Digest) -> None:
        """Let a digest stand for a tensor, for the tenant's later calls."""
        kept = self._by_field[field]
        self._registry.register_content(kept, self._session, _content_key(digest, kept.spec))

    def give_handle(self, field: str) -> None:
        """Give a tensor a new name."""
        self.handles[field] = new_name()

    def operand(self, field: str, engine: Engine) -> Tensor:
        """Return a tensor where an engine can use it. May copy it there: see `Keeper.operand`."""
        return self._registry.operand(self._by_field[field], engine, self._call)

    def commit(self) -> None:
        """Let the new names stand for their tensors, until the session ends.

        Raises:
            LostSessionError: It has ended.
            ExhaustedError: A tensor has as many names as it may. None of the new ones stands for anything.
        """
        try:
            for field, handle in self.handles.items():
                self._registry.bind_name(self._by_field[field], self._session, handle)
        except ExhaustedError:
            self._registry.drop(self._session, self.handles.values())
            raise

    def release(self) -> None:
        """Use the tensors no more."""
        self._registry.end_use(self._use)

    def _make(self, spec: TensorSpec, engine: Engine) -> ResidentEntry:
        return self._track(self._registry.make(self._session, spec, engine, self._call))

    def _track(self, kept: ResidentEntry) -> ResidentEntry:
        """Note that a tensor is to be released."""
        self._use.tensors.append(kept)
        return kept


def _check_digest(argument: str, spec: TensorSpec, digest: pb.Digest) -> None:
    if len(digest.blake3) != DIGEST_BYTES or digest.size_bytes != spec.nbytes:
        raise InvalidArgumentError(
            f"{argument} must have a digest of {DIGEST_BYTES} bytes, of {spec.nbytes} bytes for "
            f"{spec}, got one of {len(digest.blake3)} bytes, of {digest.size_bytes} bytes",
            argument=argument,
        )


def _content_key(digest: pb.Digest, spec: TensorSpec) -> Hashable:
    return digest.blake3, spec
