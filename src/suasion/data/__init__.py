"""From raw dumps to records: sources, cleaning, splits, packing."""
