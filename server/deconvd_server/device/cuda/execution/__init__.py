"""Runs calls on a card.

    lane_pool       lends each call a lane
    lane            a stream with its buffers: runs small calls by itself
      pipeline      runs large calls in parts or steps that overlap, if the card reaches their arrays
        departures  notes which parts of results the card has written
      staging       copies other large arrays, through a ring of pinned buffers
      call_kind     the work, layout and graphs of a kind of call

An indented module serves the one above it.
"""
