"""The choice of a plan, in a form that outlives the process. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Choice", "Provider"]


class Provider(StrEnum):
    """The provider of a plan: cuDNN in one of two layouts, or our own kernels."""

    CUDNN_NCHW = "cudnn nchw"
    CUDNN_NHWC = "cudnn nhwc"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that was chosen for a key.

    Attributes:
        provider: The plan's provider.
        name: The plan's name. It identifies one of our own kernels.
        deterministic: Whether two runs give the same bits.
        blob: cuDNN's serialized plan; empty for our own kernels.
        tuned_ms: Duration of an execution when plans were timed; None if they were not.
    """

    provider: Provider
    name: str
    deterministic: bool
    blob: str = ""
    tuned_ms: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return the choice as an object of JSON."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Choice:
        """Return the choice that an object of JSON describes.

        Raises:
            ValueError: A field is missing, unknown or of the wrong type.
        """
        try:
            choice = cls(**{**fields, "provider": Provider(fields["provider"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a choice: {error}") from None
        kinds = ((choice.name, str), (choice.deterministic, bool), (choice.blob, str))
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise ValueError("not a choice: a field has the wrong type")
        return choice
