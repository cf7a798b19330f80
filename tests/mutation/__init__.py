"""A test of the tests."""
