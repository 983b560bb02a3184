"""Which plan was taken, in a form that outlives the process. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Choice", "Provider"]


class Provider(StrEnum):
    """Who computes: cuDNN in one of two layouts, or our own kernels."""

    CUDNN_NCHW = "cudnn nchw"
    CUDNN_NHWC = "cudnn nhwc"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that was taken for a key.

    Attributes:
        provider: Whose it is.
        name: The plan's name; among our own kernels it says which.
        deterministic: Whether two runs give the same bits.
        blob: cuDNN's serialized plan; empty for our own.
        tuned_ms: What an execution took when plans were timed; None if they were not.
    """

    provider: Provider
    name: str
    deterministic: bool
    blob: str = ""
    tuned_ms: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Choice:
        """Return the choice that JSON describes.

        Raises:
            ValueError: It describes none.
        """
        try:
            choice = cls(**{**fields, "provider": Provider(fields["provider"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a choice: {error}") from None
        kinds = ((choice.name, str), (choice.deterministic, bool), (choice.blob, str))
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise ValueError("not a choice: a field has the wrong type")
        return choice
