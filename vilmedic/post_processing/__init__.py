"""Figures and files made from the outputs of an evaluation."""
