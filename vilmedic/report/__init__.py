"""Training curves and the report page of a run."""
