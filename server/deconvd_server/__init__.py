"""The server. A call goes through its wings in this order: transports, service, engine, device."""

import os

# Before gRPC is imported: by default its core writes a line for each handshake of TLS that fails, and whoever reaches
# the port could fill the log with them.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
