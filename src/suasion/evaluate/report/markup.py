"""HTML that is escaped by construction: only `tag` makes markup, and everything else is text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters HTML forbids, and lone surrogates, which UTF-8 cannot hold."""

VOID = frozenset({"br", "hr"})


class Html(str):
    """Text that is markup already. Made by `tag`, `text` and `join`, never from data."""

    __slots__ = ()


Content = str | Html | None
"""A child of an element: markup is kept, any other string is escaped, None is left out."""


def text(value: str) -> Html:
    """`value` with every character that means something in HTML made harmless."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNPRINTABLE.sub("\ufffd", value), quote=True))


def join(children: Iterable[Content], separator: str = "") -> Html:
    """The children one after another."""
    return Html(text(separator).join(text(child) for child in children if child is not None))


def tag(name: str, *children: Content, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: Its name.
        children: Its content.
        attributes: `class_` becomes `class`, `text_anchor` becomes `text-anchor`; True gives a bare
            attribute, None and False leave it out.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_plain(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def _plain(value: str | float) -> str:
    """An attribute's value; coordinates keep two decimals, enough for any screen."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return text(str(value))
