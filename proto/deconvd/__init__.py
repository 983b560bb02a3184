"""The contract of deconvd: what its messages, arguments and errors mean, for client and server alike."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not TYPE_CHECKING:  # so that type checkers still say what is not there

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"module 'deconvd' has no attribute {name!r}: callers import deconvd_client, whose connect() "
            "returns a connection with deconvolution_2d and the other functions"
        )
