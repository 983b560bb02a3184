"""Short programs that use deconvd. Each can be run by itself: ``python -m examples.enlarge_photograph``."""
