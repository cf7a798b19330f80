"""Unit tests of suasion.rollout."""
