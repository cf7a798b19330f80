"""The plan of a run, before the run."""
