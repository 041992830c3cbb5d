"""Images, reports, labels and their combinations, read from line-aligned text files."""
