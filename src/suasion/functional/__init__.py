"""The mathematics: pure functions of tensors and named floats, each with its source."""
