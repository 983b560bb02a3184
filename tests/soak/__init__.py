"""A soak: honest and hostile clients, by every way, of a server that is killed and drained."""
