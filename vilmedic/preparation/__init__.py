"""Data preparation: published archives turned into training folders."""
