"""RemoteTensor: the caller's handle of a resident."""

from __future__ import annotations

from typing import NamedTuple, NoReturn, Protocol

import numpy.typing as npt

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array, DType
from deconvd_client.residents.resident import Resident

__all__ = ["RemoteGradients", "RemoteTensor", "ResidentStore"]


class ResidentStore(Protocol):
    """The residents of one connection, on one server or on several. See `ResidentExecutor`."""

    def put(self, array: Array) -> Resident:
        """Send an array, and return the resident."""

    def get(self, resident: Resident) -> Array:
        """Return the elements of a resident as a new array."""


class RemoteTensor:
    """A tensor that the server keeps. The functions of its connection accept it wherever they accept an array.

    Its value never changes. `Connection.put` and the functions of `Connection.remote` return RemoteTensors.

    The server drops the tensor when its RemoteTensor is closed (by `close` or as a context manager) or
    garbage-collected, and when the connection is closed. Calls that are already running still use it.

    The server can lose a tensor: it restarts, or it runs out of memory. The client then sends the tensor again by
    itself, if it was made from an array that still has the same elements. Otherwise the next use raises
    LostTensorError.

    A RemoteTensor can be used by several threads. It cannot be pickled or copied.
    """

    def __init__(self, store: ResidentStore, resident: Resident) -> None:
        self._store = store
        self._resident = resident

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension, as numpy's ``shape``."""
        return self._resident.spec.shape

    @property
    def dtype(self) -> DType:
        """The element type, in native byte order."""
        return self._resident.spec.dtype

    @property
    def nbytes(self) -> int:
        """The size of the elements, in bytes."""
        return self._resident.spec.nbytes

    def numpy(self) -> Array:
        """Fetch the elements from the server, and return them as a new numpy array of the same shape and element type.

        Raises:
            InvalidArgumentError: The RemoteTensor is closed.
            LostTensorError: The server no longer has the tensor, and the client has no unchanged array of it.
            DeconvdError: The call failed, in one of the ways that `Connection` lists.
        """
        self._resident.check_open("the tensor")
        return self._store.get(self._resident)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        # numpy's functions call this, numpy.asarray among them
        if copy is False:
            raise ValueError(
                "the elements of a RemoteTensor are on the server: numpy cannot use them without a copy. "
                "Leave out copy=False"
            )
        return self.numpy().astype(self.dtype if dtype is None else dtype, copy=False)

    def close(self) -> None:
        """Let the server drop the tensor. Closing it twice is harmless. The server is not waited for."""
        self._resident.close()

    def belongs_to(self, store: ResidentStore) -> bool:
        """Return whether this tensor is kept for the connection of `store`."""
        return store is self._store

    def resident_for(self, store: ResidentStore, argument: str) -> Resident:
        """Return the resident, for a call of the connection of `store`.

        Args:
            store: The residents of that connection.
            argument: Name of the argument that this tensor was given for.

        Raises:
            InvalidArgumentError: The RemoteTensor is closed, or belongs to another connection.
        """
        if not self.belongs_to(store):
            raise InvalidArgumentError(
                f"{argument} belongs to another connection. Call put({argument}) on this connection and pass its "
                "result.",
                argument=argument,
            )
        self._resident.check_open(argument)
        return self._resident

    def __enter__(self) -> RemoteTensor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RemoteTensor cannot be pickled or copied: it belongs to one connection. Pickle the array that "
            "numpy() returns, and give that to put() of another connection"
        )

    def __repr__(self) -> str:
        closed = ", closed" if self._resident.is_closed else ""
        return f"<deconvd_client.RemoteTensor, {self._resident.spec}{closed}>"


class RemoteGradients(NamedTuple):
    """The gradients with respect to x, W and b, kept on the server. None for a gradient that was not requested."""

    gx: RemoteTensor | None
    gW: RemoteTensor | None
    gb: RemoteTensor | None
