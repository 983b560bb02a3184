"""Short programs that use deconvd, each runnable alone: ``python -m examples.enlarge_photograph``."""
