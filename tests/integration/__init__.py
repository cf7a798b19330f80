"""Tiny models really train."""
