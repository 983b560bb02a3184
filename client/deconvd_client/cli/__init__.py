"""The command `deconvd`: runs a deconvolution of files, and shows the state of a server."""

from deconvd_client.cli.main import main

__all__ = ["main"]
