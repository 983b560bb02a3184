"""How calls come in and answers leave, and how each call is served and observed."""
