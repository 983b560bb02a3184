"""This process and its host: buffers, copies, memory allocator, forks, operating system."""
