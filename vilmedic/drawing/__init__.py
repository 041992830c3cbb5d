"""Colours, thumbnails and image sheets that several rooms draw with."""
