"""What a process has only so much of, and how it is shared: memory, threads, file descriptors, sockets."""
