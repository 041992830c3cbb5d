"""Checkpoints: written, found, and read without executing anything."""
