"""Memory that clients on this host share with the server: the server makes it, lends it and takes it back."""

from deconvd_server.shared_memory.cuda_ipc import CardLender
from deconvd_server.shared_memory.lender import Lender
from deconvd_server.shared_memory.loans import LoanLimits
from deconvd_server.shared_memory.shared_tensors import SharedTensors

__all__ = ["CardLender", "Lender", "LoanLimits", "SharedTensors"]
