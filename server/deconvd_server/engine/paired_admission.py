"""A call's places in two admissions: that for messages on the host, and that of its device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__all__ = ["PairedAdmission"]


class PairedAdmission(AbstractContextManager[None]):
    """A call's places in two admissions. All calls take them in the same order, so none wait for each other."""

    def __init__(
        self, first: AbstractContextManager[None], second: AbstractContextManager[None]
    ) -> None:
        self._first = first
        self._second = second

    def __enter__(self) -> None:
        self._first.__enter__()
        try:
            self._second.__enter__()
        except BaseException as error:
            self._first.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *error: Any) -> None:
        self._second.__exit__(*error)
        self._first.__exit__(*error)
