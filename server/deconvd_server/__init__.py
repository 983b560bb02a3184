"""The server. In call order: transports, service, engine, device."""
