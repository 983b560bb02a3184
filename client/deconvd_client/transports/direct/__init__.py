"""Direct connections, which carry calls without gRPC."""
