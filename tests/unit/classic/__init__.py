"""The classic surface."""
