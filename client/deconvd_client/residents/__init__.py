"""Residents: the tensors that the server keeps for the session of a connection."""

from deconvd_client.residents.attempt import Attempt, Call
from deconvd_client.residents.executor import ResidentExecutor
from deconvd_client.residents.remote_tensor import (
    RemoteGradients,
    RemoteTensor,
    ResidentStore,
)
from deconvd_client.residents.resident import Resident
from deconvd_client.residents.source_array import SourceArray

__all__ = [
    "Attempt",
    "Call",
    "RemoteGradients",
    "RemoteTensor",
    "Resident",
    "ResidentExecutor",
    "ResidentStore",
    "SourceArray",
]
