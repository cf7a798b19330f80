"""Sampling, rewards and experience."""
