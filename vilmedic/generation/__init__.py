"""Image generation from text: sampling, ranking and contact sheets."""
