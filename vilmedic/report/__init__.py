"""Curves and one page a run, made from the files of its run directory."""
