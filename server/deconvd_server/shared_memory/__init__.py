"""Memory that clients on this host share with the server: the server makes it, lends it and takes it back."""

from deconvd_server.shared_memory.cuda_ipc import Cards
from deconvd_server.shared_memory.lender import Lender
from deconvd_server.shared_memory.loans import Limits
from deconvd_server.shared_memory.shared_tensors import CallTensors

__all__ = ["CallTensors", "Cards", "Lender", "Limits"]
