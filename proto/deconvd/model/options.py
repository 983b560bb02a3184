"""How to compute a deconvolution: the options of Chainer's configuration that apply to it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from deconvd.errors import InvalidArgumentError

__all__ = ["Options", "UseCudnn"]


class UseCudnn(StrEnum):
    """When cuDNN may be used: when it is the fastest, whenever it can run the operation, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Options:
    """How to compute. No option changes the meaning of the result.

    Attributes:
        cudnn_deterministic: Two runs on the same device give the same bits.
        autotune: Time the candidate algorithms once for each kind of request, and use the fastest.
        use_cudnn: When cuDNN may be used. A `UseCudnn` or its value.
        allow_tf32: Allow float32 operands to be rounded to TF32 in products. Chainer does not have this option.

    Raises:
        InvalidArgumentError: A value has the wrong type, or `use_cudnn` is not one of its three values.
    """

    cudnn_deterministic: bool = False
    autotune: bool = False
    use_cudnn: UseCudnn = UseCudnn.AUTO
    allow_tf32: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "use_cudnn" and not isinstance(value, bool):
                raise InvalidArgumentError(
                    f"{field.name} must be True or False, got {value!r}", argument=field.name
                )
        try:
            # The class is frozen. Users of Chainer pass a string, which becomes the enumeration once, here.
            object.__setattr__(self, "use_cudnn", UseCudnn(self.use_cudnn))
        except ValueError:
            raise InvalidArgumentError(
                f"use_cudnn must be 'auto', 'always' or 'never', got {self.use_cudnn!r}",
                argument="use_cudnn",
            ) from None
