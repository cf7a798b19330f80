"""Numbers as people write them: rounded, grouped, with a real minus sign and a unit."""

from __future__ import annotations

from typing import Any

THIN = "\u202f"
"""Narrow space that does not break, between a number and its unit."""
NONE = "\u2013"
"""What stands where there is no number."""
TIMES = "\u00d7"
LARGEST = 1e150
"""Beyond it a difference or a product may overflow, and no figure of a run means anything."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any) -> float | None:
    """`value` if it is a finite number below `LARGEST`, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if abs(as_float) < LARGEST else None


def decimal(value: Any) -> str:
    """About three significant digits."""
    finite = number(value)
    if finite is None:
        return NONE
    size = abs(finite)
    if size == 0:
        return "0"
    if size < 0.001 or size >= 1e7:
        mantissa, exponent = f"{finite:.1e}".split("e")
        return _minus(f"{mantissa}{THIN}{TIMES}{THIN}10{str(int(exponent)).translate(SUPERSCRIPT)}")
    if finite == int(finite) and size >= 10:
        return _minus(f"{finite:,.0f}")
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.0995 else 3
    return _minus(f"{finite:,.{digits}f}")


def signed(value: float) -> str:
    """`decimal` with a plus sign where it is due."""
    return f"+{decimal(value)}" if value > 0 else decimal(value)


def count(value: Any) -> str:
    """A whole number, grouped."""
    finite = number(value)
    return NONE if finite is None else _minus(f"{finite:,.0f}")


def percent(value: Any) -> str:
    """A share as a percentage with one decimal."""
    finite = number(value)
    return NONE if finite is None else _minus(f"{100 * finite:.1f}") + f"{THIN}%"


def interval(low: Any, high: Any) -> str:
    """Two shares as a range of percentages; empty unless both are known."""
    first, last = number(low), number(high)
    if first is None or last is None:
        return ""
    # The word joiner after the dash keeps the range on one line.
    return f"{100 * first:.1f}\u2013\u2060{100 * last:.1f}{THIN}%"


def duration(seconds: Any) -> str:
    """A span of time in the two units that matter."""
    finite = number(seconds)
    if finite is None:
        return NONE
    if finite < 59.95:
        return f"{finite:.1f}{THIN}s"
    minutes, rest = divmod(round(finite), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{THIN}h {minutes:02d}{THIN}min"
    return f"{minutes}{THIN}min {rest:02d}{THIN}s"


def plain(value: Any) -> str:
    """Any value of a result or a manifest, as text: whole numbers in full, others to 4 digits."""
    if isinstance(value, int):
        return str(value)
    if (finite := number(value)) is not None:
        return _minus(f"{finite:.4g}")
    if value is None or isinstance(value, float):
        return NONE
    return str(value)


def spaced(key: str) -> str:
    """A key of a record as words: `pairs_train` reads "pairs train"."""
    return key.replace("_", " ").replace("/", " ")


def _minus(written: str) -> str:
    return written.replace("-", "\u2212")
