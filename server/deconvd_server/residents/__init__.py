"""Resident tensors, which the server keeps for a client between calls, and the sessions that they belong to."""

from deconvd_server.residents.call_residents import CallResidents
from deconvd_server.residents.entry import ResidentEntry
from deconvd_server.residents.registry import ResidentRegistry
from deconvd_server.residents.residents import ResidentLimits, Residents
from deconvd_server.residents.sessions import Reaper, SessionLimits, Sessions
from deconvd_server.residents.tenant import Session

__all__ = [
    "CallResidents",
    "Reaper",
    "ResidentEntry",
    "ResidentLimits",
    "ResidentRegistry",
    "Residents",
    "Session",
    "SessionLimits",
    "Sessions",
]
