"""Tests with the frameworks themselves. Each has an environment of its own: see `make test-torch`, for one."""
