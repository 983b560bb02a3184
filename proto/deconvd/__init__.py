"""What client and server share: the computation, the messages, the protocols, and the errors."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not TYPE_CHECKING:  # type checkers would otherwise accept every attribute

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"module 'deconvd' has no attribute {name!r}: callers import deconvd_client, whose connect() "
            "returns a connection with deconvolution_2d and the other functions"
        )
