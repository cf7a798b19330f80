"""Unit tests of suasion.config."""
