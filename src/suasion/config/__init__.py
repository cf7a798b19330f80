"""Typed configuration: frozen dataclasses in, one list of mistakes out."""
