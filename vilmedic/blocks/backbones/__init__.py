"""Backbones of image encoders, one file for each library that they come from."""
