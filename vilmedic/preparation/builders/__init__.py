"""Data set builders: one per published data set."""
