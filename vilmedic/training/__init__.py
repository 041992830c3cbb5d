"""Training: the loop, its state and what watches over it."""
