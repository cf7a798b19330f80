"""What suasion holds in memory, measured: predicted against real, one base against four."""
