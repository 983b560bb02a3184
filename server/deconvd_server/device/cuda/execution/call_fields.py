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
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]


@lru_cache(_LRU_ENTRIES_COUNT)
def select_fields(
    operation: Operation, wanted: tuple[str, ...], given: tuple[str, ...]
) -> CallFields:
    """Return the fields of a call, given the names of its wanted results and of its operands."""
    results = tuple([field for field in operation.all_results if field in wanted])
    needed = operation.operands_for(results, [f for f in operation.optional if f in given])
    operands = tuple(sorted(needed, key=operation.constants.__contains__))
    return CallFields(operands, results)
