"""Stack Exchange bodies are HTML; models read and write Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

import html_to_markdown
from html_to_markdown import ConversionError, ConversionOptions, convert

_ENUMS: Final = {
    "code_block_style": "CodeBlockStyle",
    "heading_style": "HeadingStyle",
    "hidden_content": "HiddenContent",
    "highlight_style": "HighlightStyle",
    "inline_data_media": "InlineDataMedia",
    "link_style": "LinkStyle",
    "list_indent_type": "ListIndentType",
    "newline_style": "NewlineStyle",
    "output_format": "OutputFormat",
    "tier_strategy": "TierStrategy",
    "url_escape_style": "UrlEscapeStyle",
    "whitespace_mode": "WhitespaceMode",
}


def _with_enums(options: ConversionOptions) -> ConversionOptions:
    """Name choices by enum members.

    The converter looks up those named by strings again at each call, which takes several times as
    long as the conversion of a typical body.
    """
    members: dict[str, Any] = {
        field: getattr(getattr(html_to_markdown, enum), getattr(options, field).upper())
        for field, enum in _ENUMS.items()
    }
    return replace(options, **members)


# Escapes are off because they damage LaTeX (`$O(n\_i)$`) and names (`snake\_case`).
_OPTIONS = _with_enums(
    ConversionOptions(
        code_block_style="backticks",
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
        extract_metadata=False,
    )
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


def to_markdown(html: str) -> str:
    r"""Convert an HTML body to Markdown.

    Code blocks become fences (with their language when it is named), lists use `-`, LaTeX stays as
    it is. Control characters, spaces at line ends and blank lines around the text are removed.

    Args:
        html: The body, already unescaped from XML.

    Returns:
        Markdown without a final newline; empty when the body holds no text.

    Raises:
        ValueError: the converter refused the body.
    """
    clean = _CONTROL.sub("", html.replace("\r\n", "\n").replace("\r", "\n"))
    try:
        content: str = convert(clean, _OPTIONS).content or ""
    except ConversionError as error:
        raise ValueError(f"the HTML cannot be converted: {error}") from error
    return _TRAILING.sub("", content.replace("\xa0", " ")).strip("\n")
