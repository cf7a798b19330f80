"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    """Of the check."""
    ok: bool
    """Whether it found nothing wrong."""
    measured: dict[str, float] = field(default_factory=dict)
    """The figures it judged by; empty where there was nothing to measure."""
    what: str = ""
    """What is wrong, with the figures; or why there was nothing to measure."""
    likely_cause: str = ""
    """What usually does this."""
    fix: str = ""
    """What to do about it, as an instruction."""

    @property
    def applies(self) -> bool:
        """Whether there was anything to look at."""
        return bool(self.measured) or not self.ok


def does_not_apply(name: str, why: str) -> Finding:
    """A check with nothing to look at in this run."""
    return Finding(name, ok=True, what=why)
