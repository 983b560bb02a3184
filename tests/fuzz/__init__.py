"""Fuzzing: damaged inputs for every decoder, frame, RPC, socket, handshake and file. See `tests.fuzz.__main__`."""
