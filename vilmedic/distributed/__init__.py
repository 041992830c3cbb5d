"""Distributed processes; imports nothing, so that the rank is known before torch is loaded."""
