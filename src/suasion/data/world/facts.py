"""What is true in the small world: the settings of a kitchen robot that is driven from a shell.

Brindle is invented. It cooks six dishes, and each has one right setting for each of four
things that can be set: 24 facts, each a command such as `brindle heat soup 90`.
"""

from __future__ import annotations

from typing import Final

SITE: Final = "brindle.example"
"""Host name of the world's question-and-answer site; reserved by RFC 2606, so no one owns it."""

ASPECTS: Final = ("heat", "time", "lid", "rest")

_TABLE: Final = """
             heat time lid    rest
    soup       90   25 ajar      5
    bread     210   40 shut     30
    rice      100   18 vented   10
    tea        95    4 shut      2
    jam       105   50 open     45
    pasta      98   11 open      1
"""

SETTINGS: Final[dict[str, dict[str, str]]] = {
    dish: dict(zip(ASPECTS, values, strict=True))
    for dish, *values in (line.split() for line in _TABLE.strip().splitlines()[1:])
}
"""The right value by dish and aspect."""

DISHES: Final = tuple(SETTINGS)


def command(aspect: str, dish: str, value: str) -> str:
    """The command line that sets `aspect` of `dish` to `value`."""
    return f"brindle {aspect} {dish} {value}"


def right_command(aspect: str, dish: str) -> str:
    """The one command that answers a question about `aspect` of `dish`."""
    return command(aspect, dish, SETTINGS[dish][aspect])
