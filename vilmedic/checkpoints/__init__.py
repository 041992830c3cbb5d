"""Checkpoints: writing, finding, and loading without executing anything."""
