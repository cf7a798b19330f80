"""Statistics and the report."""
