"""Unit tests of suasion.trainers."""
