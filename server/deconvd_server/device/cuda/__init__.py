"""NVIDIA GPUs as devices: cuDNN, and our own kernels where those are faster. Needs the `cuda13` extra."""
