"""The contract of deconvd: what its messages, arguments and errors mean, for client and server alike."""

__version__ = "0.1.0"
