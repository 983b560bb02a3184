"""Plans of one card: made as candidates, chosen by a tuner, cached in memory, and stored on disk.

    plan_cache      the plan of a key: from memory, from disk, a stand-in, or chosen now
      later_searches searches for those that have stand-ins, while the card is idle
      store         choices on disk
      quarantine    searches that are not repeated, because a process died in one (`journal`)
      tuner         chooses one of the candidates, which `plan_timer` times
      candidates    makes them: cuDNN's and our own, wrapped by `casting`, `channels_last` and `crop`
      rehearsal     loads at the start what libraries load at their first use
      build_threads the threads that do all of this

An indented module serves the one above it.
"""
