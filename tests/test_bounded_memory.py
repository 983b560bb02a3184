"""What one client can make a server take of memory: no more than its budgets and what is said here."""

from __future__ import annotations
