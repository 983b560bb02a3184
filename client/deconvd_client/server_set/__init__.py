"""Several servers behind one name: which of them serves a call, and what becomes of it if that one fails."""
