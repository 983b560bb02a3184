"""A plugin of pytest's for runs that ask only whether tests fail.

Hypothesis does not look for the simplest example, and does not mind a slow machine, which says nothing about a mutant.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

__all__: list[str] = []

settings.register_profile(
    "unshrunk",
    phases=[Phase.explicit, Phase.generate],
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unshrunk")
