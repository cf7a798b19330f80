"""HTML bodies as Markdown."""

from __future__ import annotations

import pytest

from suasion.data.markup import to_markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("", ""),
        ("<p></p>\n", ""),
        ("<p>a &amp; b &lt;c&gt;</p>\n", "a & b <c>"),
        ("<p>use <code>a_b*c</code></p>", "use `a_b*c`"),
        ("<pre><code>if x:\n    y\n</code></pre>\n", "```\nif x:\n    y\n```"),
        ('<pre class="lang-py"><code>x = 1\n</code></pre>', "```py\nx = 1\n```"),
        ("<p>one</p>\n\n<ul>\n<li>two</li>\n<li>three</li>\n</ul>", "one\n\n- two\n- three"),
        ('<p>see <a href="https://a.example/b">c</a></p>', "see [c](https://a.example/b)"),
        (r"<p>$O(n_i \log n)$ and snake_case</p>", r"$O(n_i \log n)$ and snake_case"),
        ("<p>one<br>two</p>", "one\ntwo"),
        ("<p>a\r\nb</p>\r\n", "a\nb"),
        ("<p>a\x01b\x00c</p>", "abc"),
    ],
)
def test_conversion(html: str, markdown: str) -> None:
    """Bodies of every kind come out as expected."""
    assert to_markdown(html) == markdown


def test_depth_does_not_break_it() -> None:
    """Absurd nesting neither crashes nor hangs."""
    assert isinstance(to_markdown("<div>" * 20_000 + "x"), str)
