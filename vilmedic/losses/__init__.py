"""Loss functions: pure functions, each with a thin module that a config can name."""
