"""How to compute a deconvolution: the part of Chainer's configuration that matters here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from deconvd.errors import InvalidArgumentError

__all__ = ["Options", "UseCudnn"]


class UseCudnn(StrEnum):
    """Whether cuDNN may be used: where it is the fastest, wherever it can, or nowhere."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Options:
    """How to compute. No option changes what the result means.

    Attributes:
        cudnn_deterministic: Two runs on one device give the same bits.
        autotune: Pick the fastest way by timing, once for each kind of request.
        use_cudnn: Whether cuDNN may be used; a `UseCudnn` or its value.
        allow_tf32: Let float32 operands be rounded to TF32 in products. Not in Chainer.

    Raises:
        InvalidArgumentError: A value is of the wrong type, or `use_cudnn` is none of its three values.
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
            # frozen: the string that Chainer's users pass becomes the enumeration once, here
            object.__setattr__(self, "use_cudnn", UseCudnn(self.use_cudnn))
        except ValueError:
            raise InvalidArgumentError(
                f"use_cudnn must be 'auto', 'always' or 'never', got {self.use_cudnn!r}",
                argument="use_cudnn",
            ) from None
