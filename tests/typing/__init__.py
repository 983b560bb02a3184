"""What type checkers know of the public API: they read these modules, and nothing runs them."""
