"""What a process has a limited amount of, and how it is shared: memory, threads, file descriptors, sockets."""
