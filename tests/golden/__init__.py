"""Golden vectors and the loops that write them."""
