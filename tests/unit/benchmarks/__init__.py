"""What the benchmarks compute from their readings."""
