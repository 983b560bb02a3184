"""Plans: which candidates there are for a request, which is taken, and where that is kept."""
