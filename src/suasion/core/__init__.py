"""What every room shares: errors, files, seeds, records, progress."""
