"""Training, validation, checkpoints and evaluation."""
