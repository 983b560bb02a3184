"""The interface of what executes the calls of a connection: one server, or several behind one name."""

from __future__ import annotations

from typing import Protocol

from deconvd.model.dtypes import Array
from deconvd_client.residents import Call, Resident, ResidentStore

__all__ = ["CallExecutor"]


class CallExecutor(Protocol):
    """Executes calls. Thread-safe. Its methods raise DeconvdErrors, within the time that each call may take."""

    @property
    def residents(self) -> ResidentStore:
        """The tensors that are kept for the connection."""

    def execute(self, call: Call) -> dict[str, Array]:
        """Make a call whose arrays may be on cards, and return its results, by the names of their fields.

        Results are cupy arrays if `call.results_like` is one, else numpy arrays.

        Raises:
            LostTensorError: An operand is lost, and it cannot be sent again.
        """

    def execute_and_keep(self, call: Call) -> dict[str, Resident]:
        """Make a call whose results stay where they were computed, and return them as residents.

        Raises:
            LostTensorError: As for `execute`.
        """
