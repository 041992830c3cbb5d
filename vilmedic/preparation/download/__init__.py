"""Fetches what a configuration trains on: restartable, verified, with clear messages."""
