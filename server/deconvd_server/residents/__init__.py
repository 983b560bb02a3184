"""Tensors that stay on the server for the clients that sent them, and the sessions that they stay for."""

from deconvd_server.residents.call_residents import CallResidents
from deconvd_server.residents.entry import Kept
from deconvd_server.residents.registry import Keeper
from deconvd_server.residents.residents import ResidentLimits, Residents
from deconvd_server.residents.sessions import Reaper, SessionLimits, Sessions
from deconvd_server.residents.tenant import Session

__all__ = [
    "CallResidents",
    "Keeper",
    "Kept",
    "Reaper",
    "ResidentLimits",
    "Residents",
    "Session",
    "SessionLimits",
    "Sessions",
]
