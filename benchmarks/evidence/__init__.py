"""The proof that the policy loop learns, made again by `make evidence`."""
