"""The daemon: runs deconvolutions for clients. In call order: __main__, service, engine, device."""
