"""How to compute a deconvolution: the options of Chainer's configuration that apply to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final

from deconvd.errors import InvalidArgumentError

__all__ = ["Options", "UseCudnn", "UseCudnnTensorCore"]


class UseCudnn(StrEnum):
    """When cuDNN may be used: when it is the fastest, whenever it can run the operation, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class UseCudnnTensorCore(StrEnum):
    """When tensor cores may be used, by cuDNN or others: when that is the fastest, whenever possible, or never."""

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
        use_cudnn_tensor_core: When tensor cores may be used. A `UseCudnnTensorCore` or its value. ``never`` keeps them
            out of every element type, and TF32 too. The other two differ in nothing: tensor cores compute half
            precision where that is the fastest, and float32 only if `allow_tf32` allows it.

    Raises:
        InvalidArgumentError: A value has the wrong type, or is not one of the three that it may be.
    """

    cudnn_deterministic: bool = False
    autotune: bool = False
    use_cudnn: UseCudnn = UseCudnn.AUTO
    allow_tf32: bool = False
    use_cudnn_tensor_core: UseCudnnTensorCore = UseCudnnTensorCore.AUTO

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _ENUMS:
                # The class is frozen. Users of Chainer pass a string, which becomes the enumeration once, here.
                object.__setattr__(self, field.name, _member(field.name, value))
            elif not isinstance(value, bool):
                raise InvalidArgumentError(
                    f"{field.name} must be True or False, got {value!r}", argument=field.name
                )


_ENUMS: Final[Mapping[str, type[StrEnum]]] = {
    "use_cudnn": UseCudnn,
    "use_cudnn_tensor_core": UseCudnnTensorCore,
}
"""By the name of an option that has three values: its enumeration."""


def _member(name: str, value: object) -> StrEnum:
    try:
        return _ENUMS[name](value)  # type: ignore[arg-type]  # the try finds out whether it is one of its values
    except ValueError:
        raise InvalidArgumentError(
            f"{name} must be 'auto', 'always' or 'never', got {value!r}", argument=name
        ) from None
