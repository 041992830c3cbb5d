"""Comparison and sweeps of several runs."""
