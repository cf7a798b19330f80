"""What a recipe will need, in bytes and seconds, before anything of it is run."""
