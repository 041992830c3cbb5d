"""Evaluation of trained models: features, results and their folders."""
