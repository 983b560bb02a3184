"""Runs calls on a card.

lane_pool       lends each call a lane
lane            a stream with its buffers: runs small calls by itself, and large ones
pipeline          in parts or steps that overlap, where the card reaches their arrays
staging           or through a ring of pinned buffers
call_kind       the work, layout and graphs of a kind of call
"""
