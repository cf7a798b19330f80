"""Unit tests of suasion.core."""
