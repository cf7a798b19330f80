"""The generate / step / log_stats surface of TRL 0.4.2 to 0.11, as a thin view over the core."""
