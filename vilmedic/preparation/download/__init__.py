"""Resumable, verified downloads of data sets."""
