"""Encoders and heads that models are composed of."""
