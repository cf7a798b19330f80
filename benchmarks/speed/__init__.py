"""How fast it runs and how much memory it takes, beside the peers."""
