"""Tests, from static to the whole pipeline."""
