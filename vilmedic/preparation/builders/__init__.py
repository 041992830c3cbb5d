"""One builder for each data set: published tables and reports become a folder to train on."""
