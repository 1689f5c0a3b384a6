"""Text that is made to harm, and checks that what is shown of it is harmless."""

from __future__ import annotations

import re

FORGED = "FORGED: valid atlas 1.0"
MARKUP = (
    "[x](javascript:alert(1)) ![i](https://evil.example/a.png) <img src=evil> https://evil.example www.evil.example "
    "@octocat someone@evil.example `code` | **bold** $x$ [^1]"
)
HOSTILE = f"a\n{FORGED}\r\n{FORGED}\x1b[2J\x9b31m\u202e\u2028{FORGED} {MARKUP}"
LONG = HOSTILE + "日本" * 100_000
LONGEST_LINE = 4000


def check_lines(text: str) -> None:
    for line in text.split("\n"):
        assert line.isprintable(), line[:200]
        assert len(line) <= LONGEST_LINE, line[:200]
        assert not line.lstrip().startswith(FORGED)


def visible(markdown: str) -> str:
    """``markdown`` without front matter and code, in which nothing has a meaning, and without escaped characters."""
    markdown = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^```[a-z]+\n.*?\n```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\\[!-/:-@\[-`{-~]|`[^`\n]*`", "", markdown)


def check_markdown(text: str) -> None:
    assert all(len(line) <= 10 * LONGEST_LINE for line in text.split("\n"))
    shown = visible(text)
    assert "](javascript" not in shown
    assert "<img" not in shown
    assert "[^1]" not in shown
    assert "**bold" not in shown
    linked = re.search(r".{,80}(://|www\.|@\w|\w@)", shown)
    assert linked is None, linked
    assert not re.search(r"!\[[^\]]*\]\((?!figures/|layers\.svg)", shown)
