"""Several processes that serve as one: a supervisor, which opens no device, and the workers that it starts.

    supervisor --starts, restarts, tells to stop--> worker 0: a whole server, with its device, ports, sockets, memory
               <--ready, alive, stopping-----------           (the same command in a process of its own)

The supervisor alone answers for health and metrics on ports of their own, tells systemd, and prints where to call.
Calls never pass through it: workers share a TCP port (SO_REUSEPORT), and a shared Unix path is a second name of one
worker's socket.
"""
