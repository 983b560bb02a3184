"""Memory that the server shares with clients on its host: the server allocates it, lends it and takes it back."""

from deconvd_server.shared_memory.cuda_ipc import CardLender
from deconvd_server.shared_memory.lender import Lender
from deconvd_server.shared_memory.loans import LoanLimits
from deconvd_server.shared_memory.shared_tensors import SharedTensors

__all__ = ["CardLender", "Lender", "LoanLimits", "SharedTensors"]
