"""The systems that can be trained, one file each."""
