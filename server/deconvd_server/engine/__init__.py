"""Engines: each owns a device, and decides which calls run on it and when."""
