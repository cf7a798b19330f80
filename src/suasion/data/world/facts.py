"""What is true in the small world: the settings of a kitchen robot that is driven from a shell.

Brindle is invented. It cooks six dishes, and each has one right setting for each of six
things that can be set: 36 facts, each a command such as `brindle heat soup 90`.
"""

from __future__ import annotations

from typing import Final

SITE: Final = "brindle.example"
"""Host name of the world's question-and-answer site; reserved by RFC 2606, so no one owns it."""

ASPECTS: Final = ("heat", "time", "speed", "lid", "water", "rest")

_TABLE: Final = """
             heat time speed lid    water rest
    soup       90   25     3 ajar       8    5
    bread     210   40     1 shut       2   30
    rice      100   18     2 vented     4   10
    tea        95    4     1 shut       3    2
    jam       105   50     4 open       1   45
    pasta      98   11     2 open       9    1
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
