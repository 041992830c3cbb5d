"""Training loop, state and monitoring."""
