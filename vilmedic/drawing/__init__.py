"""Shared drawing helpers: colours, thumbnails and image sheets."""
