"""Several runs: compared, and swept."""
