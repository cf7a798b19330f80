"""Loading, roles and heads."""
