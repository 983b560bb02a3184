"""Tensors that stay on the server, for as long as the session of their connection."""

from deconvd_client.residents.attempt import Attempt, Call
from deconvd_client.residents.executor import Residents
from deconvd_client.residents.remote_tensor import RemoteGradients, RemoteTensor
from deconvd_client.residents.resident import Kept
from deconvd_client.residents.source_array import Source

__all__ = ["Attempt", "Call", "Kept", "RemoteGradients", "RemoteTensor", "Residents", "Source"]
