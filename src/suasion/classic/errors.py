"""Errors of the classic surface."""

from __future__ import annotations

from suasion.core.errors import ConfigError


class ArgumentError(ConfigError, ValueError):
    """An argument cannot be used; also a ValueError, which scripts of the time expect."""
