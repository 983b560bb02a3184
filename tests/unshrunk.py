"""A plugin of pytest's for runs that ask only whether tests fail: hypothesis does not look for the simplest example."""

from __future__ import annotations

from hypothesis import Phase, settings

__all__: list[str] = []

settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("unshrunk")
