"""What one call is: its specification, its deadline and its transport. Knows no other package of the client."""
