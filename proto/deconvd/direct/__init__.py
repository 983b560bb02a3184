"""Direct connections: the protocol that carries calls without gRPC, and the sockets below it."""
