"""This process's memory and its operating system: buffers, copies, allocator, forks."""
