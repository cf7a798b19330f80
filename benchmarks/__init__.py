"""Measurements: whether it learns, and how fast it runs."""
