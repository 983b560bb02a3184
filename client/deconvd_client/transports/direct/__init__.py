"""Direct connections to a server: calls without gRPC."""
