"""What came out: perplexity, accuracy, win rates, the report."""
