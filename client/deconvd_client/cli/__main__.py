"""Runs the command `deconvd`, as ``python -m deconvd_client.cli``."""

from deconvd_client.cli.main import main

if __name__ == "__main__":
    main(prog_name="deconvd")
