"""What is true in the small world: the settings of a kitchen robot that is driven from a shell.

Brindle is invented. It cooks twelve dishes, and each has one right setting for each of eight
things that can be set: 96 facts, each a command such as `brindle heat soup 90`.
"""

from __future__ import annotations

from typing import Final

SITE: Final = "brindle.example"
"""Host name of the world's question-and-answer site; reserved by RFC 2606, so no one owns it."""

ASPECTS: Final = ("heat", "time", "speed", "lid", "fit", "water", "rest", "wash")

_TABLE: Final = """
             heat time speed lid    fit    water rest wash
    soup       90   25     3 ajar   paddle     8    5 soak
    bread     210   40     1 shut   hook       2   30 scrub
    rice      100   18     2 shut   paddle     4   10 rinse
    tea        95    4     1 shut   whisk      3    2 rinse
    jam       105   50     4 open   paddle     1   45 steam
    pasta      98   11     2 open   blade      9    1 rinse
    porridge   80   12     5 ajar   whisk      5    3 soak
    custard    75   15     6 open   whisk      2   20 steam
    stew       88   90     1 vented blade      6   15 scrub
    dough      30   60     4 vented hook       3   50 soak
    sauce      70   20     5 ajar   blade      1    4 steam
    cocoa      65    6     6 vented whisk      7    8 scrub
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
