"""All kinds of hostile clients, by name."""

from tests.soak.hostile import by_grpc, by_lines, by_memory, by_stripes  # noqa: F401 - they add themselves
from tests.soak.hostile.attack import KINDS

__all__ = ["KINDS"]
