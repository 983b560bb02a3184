"""The protocol by which a server lends shared memory to clients on its host."""
