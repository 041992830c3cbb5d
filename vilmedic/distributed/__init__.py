"""The processes of a run; nothing is imported here, so that a rank is known before torch."""
