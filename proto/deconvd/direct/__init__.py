"""Direct connections: the protocol that carries calls without gRPC, and the byte streams below it."""
