"""The server. A call goes through its wings in this order: transports, service, engine, device."""
