"""Version 1 of the schema. The modules here are generated from deconvd.proto; see `make generate`."""
