"""The fields of an operation that a call uses, in the order of its work. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from deconvd.model.operation import Operation

__all__ = ["CallFields", "select_fields"]

_LRU_ENTRIES_COUNT: Final = 1024


class CallFields(NamedTuple):
    """The results that a call computes, and the operands that they need.

    Attributes:
        operands, results: Their names, in the order of the call's work. Operands that can be divided come first.
        product_of_W: The result that W is used for; None if W is not used.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    product_of_W: str | None


@lru_cache(_LRU_ENTRIES_COUNT)
def select_fields(
    operation: Operation, wanted: tuple[str, ...], given: tuple[str, ...]
) -> CallFields:
    """Return the fields of a call, given the names of its wanted results and of its operands."""
    results = tuple([field for field in operation.all_results if field in wanted])
    needed = operation.operands_for(results, [f for f in operation.optional if f in given])
    operands = tuple(sorted(needed, key=operation.constants.__contains__))
    product_of_W = next((field for field in results if "w" in operation.needs[field]), None)
    return CallFields(operands, results, product_of_W)
