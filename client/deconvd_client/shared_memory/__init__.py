"""Shared memory that a server on this host lends: arrays in it need not be sent."""

from deconvd_client.shared_memory.borrower import Borrower
from deconvd_client.shared_memory.shared_calls import (
    SharedCall,
    SharedResult,
    call_with_shared_memory,
)

__all__ = ["Borrower", "SharedCall", "SharedResult", "call_with_shared_memory"]
