"""Places outside the run directory's own files that the numbers of a run can go to."""
