"""Where a post comes from and what may be done with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from suasion.core.errors import DataError

_MONTH: Final = re.compile(r"-\d{4}-\d{2}(?:-\d{2})?$")
_META: Final = re.compile(r"[-.]meta$")
_HOST: Final = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*", re.ASCII)


def site_of(dump: Path) -> str:
    """Host name of the site from its dump folder's name.

    `beer-2016-12` gives `beer.stackexchange.com`, `conlang-meta` gives
    `conlang.meta.stackexchange.com`, and a name with a dot, as the official archives have
    (`beer.stackexchange.com`), is taken as it is.

    Raises:
        DataError: the name cannot be a host name.
    """
    name = _MONTH.sub("", dump.resolve().name.lower())
    if "." in name:
        return checked_site(name)
    return checked_site(_META.sub(".meta", name) + ".stackexchange.com")


def checked_site(site: str) -> str:
    """The host name, if it is one: it becomes part of every link.

    Raises:
        DataError: it is not.
    """
    if not _HOST.fullmatch(site):
        raise DataError(
            f"{site[:80]!r} is not the host name of a site",
            "name it: --site beer.stackexchange.com, or prepare.site in a recipe",
        )
    return site


def licence_at(date: str) -> str:
    """Licence of a post from its creation date, an ISO 8601 string; without version if empty.

    Source: https://stackoverflow.com/help/licensing (4.0 from 2018-05-02, 3.0 from 2011-04-08).
    """
    if not date:
        return "CC BY-SA"
    if date >= "2018-05-02":
        return "CC BY-SA 4.0"
    return "CC BY-SA 3.0" if date >= "2011-04-08" else "CC BY-SA 2.5"
