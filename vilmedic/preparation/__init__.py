"""From published archives to a folder that a configuration trains on."""
