"""What a caller has of a tensor on the server."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy.typing as npt

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array, DType
from deconvd_client.residents.executor import ResidentExecutor
from deconvd_client.residents.resident import Resident

__all__ = ["RemoteGradients", "RemoteTensor"]


class RemoteTensor:
    """A tensor that the server keeps, accepted by its connection's functions wherever an array is.

    It is never changed. It is dropped when this is closed, as a context manager or by `close`, or
    collected, or when the connection is closed; calls under way may still use it.

    If the server has lost it (it was started anew, or ran short of memory), it is sent again where
    it was made of an array that still holds the same; else its use raises LostTensorError.
    """

    def __init__(self, home: ResidentExecutor, kept: Resident) -> None:
        self._executor = home
        self._resident = kept

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of each dimension."""
        return self._resident.spec.shape

    @property
    def dtype(self) -> DType:
        """The element type, in native byte order."""
        return self._resident.spec.dtype

    @property
    def nbytes(self) -> int:
        """Size of its elements, in bytes."""
        return self._resident.spec.nbytes

    def numpy(self) -> Array:
        """Return its elements, fetched from the server, as an array of the caller's own.

        Raises:
            InvalidArgumentError: It is closed.
            LostTensorError: The server no longer has it, and there is no array to take them from.
        """
        self._resident.check_open("the tensor")
        return self._executor.get(self._resident)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        # numpy's functions, numpy.asarray among them, fetch it
        if copy is False:
            raise ValueError(
                "a RemoteTensor is on the server: no array of it can be had without a copy"
            )
        return self.numpy().astype(self.dtype if dtype is None else dtype, copy=False)

    def close(self) -> None:
        """Have the server drop it. Closing twice is harmless."""
        self._resident.close()

    def belongs_to(self, home: ResidentExecutor) -> bool:
        """Return whether it is a connection's own."""
        return home is self._executor

    def resident_for(self, home: ResidentExecutor, argument: str) -> Resident:
        """Return what calls of a connection need of it.

        Raises:
            InvalidArgumentError: It is closed, or another connection's.
        """
        if not self.belongs_to(home):
            raise InvalidArgumentError(
                f"{argument} must not be a RemoteTensor of another connection", argument=argument
            )
        self._resident.check_open(argument)
        return self._resident

    def __enter__(self) -> RemoteTensor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RemoteTensor cannot be pickled or copied: it is its connection's. Pickle the array that "
            "its numpy() returns; put() of a connection makes another of it"
        )

    def __repr__(self) -> str:
        closed = ", closed" if self._resident.is_closed else ""
        return f"<deconvd_client.RemoteTensor, {self._resident.spec}{closed}>"


class RemoteGradients(NamedTuple):
    """Gradients with respect to x, W and b that stay on the server; None for one that was not wanted."""

    gx: RemoteTensor | None
    gW: RemoteTensor | None
    gb: RemoteTensor | None
