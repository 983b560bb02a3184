"""The daemon: runs deconvolutions for clients. In call order: rpc or direct_line, service, exchange, engine, device."""
