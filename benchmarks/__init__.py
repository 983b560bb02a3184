"""How fast it is: one command a question."""
