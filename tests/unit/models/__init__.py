"""Unit tests of suasion.models."""
