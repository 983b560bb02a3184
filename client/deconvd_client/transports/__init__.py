"""How calls reach a server: routes and retries, direct connections, gRPC, and streams for large tensors."""
