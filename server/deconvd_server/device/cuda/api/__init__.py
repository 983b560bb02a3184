"""The parts of CUDA's runtime and driver that are used, typed, and its memory."""
