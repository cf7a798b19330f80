"""Tests of `suasion.data`."""
