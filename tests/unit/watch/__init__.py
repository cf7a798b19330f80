"""Each check catches its fault, and passes what is healthy."""
