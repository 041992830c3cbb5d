"""Images from text: sampling, ranking and contact sheets."""
