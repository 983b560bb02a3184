"""The workers of one host: processes that serve as one. Which of them serves a call, and what if that one ends."""
