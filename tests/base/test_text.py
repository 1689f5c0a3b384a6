"""Text for people and machines: width in terminals, numbers, cells that a spreadsheet would run, markup from files."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest

from chanfmt.base import html, markdown
from chanfmt.base.text import (
    FORMULA_STARTS,
    cell_width,
    distinct_lines,
    format_table,
    json_text,
    number,
    one_line,
    padded,
    spreadsheet_text,
)
from chanfmt.reporting.pages import _texts
from surgery.experiments.results import CSV_FILE, Results
from tui.session.export import write_table

COMBINING = "e\N{COMBINING ACUTE ACCENT}"


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("", 0), ("日本語", 6), ("한글", 4), (COMBINING, 1), ("é", 1), ("日本" + COMBINING, 5)]
)
def test_width_is_counted_in_cells(text: str, width: int) -> None:
    assert cell_width(text) == width
    assert padded(text, 8) == text + " " * (8 - width)
    assert padded(text, 8, right=True) == " " * (8 - width) + text


def test_columns_align_in_cells() -> None:
    rows = [["日本語モデル", "1"], ["plain", "22"], [COMBINING * 5, "333"]]
    text = format_table(["name", "件数"], rows)
    assert text.splitlines() == [
        "name          件数",
        "日本語モデル     1",
        "plain           22",
        f"{COMBINING * 5}          333",
    ]
    assert len({cell_width(line) for line in text.splitlines()}) == 1


def test_a_table_has_one_line_for_each_row() -> None:
    assert format_table(["name", "n"], [["a\nb\x1b[2J", 3]]).splitlines()[1] == "a b\N{REPLACEMENT CHARACTER}[2J  3"


def test_ascii_tables_need_no_other_package() -> None:
    code = "import sys; from chanfmt.base.text import format_table; format_table(['a'], [['b']]); print('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_numbers() -> None:
    assert [number(12345), number(0.123456), number(float("nan"))] == ["12,345", "0.1235", "-"]


def test_json_is_finite_and_safe_to_show() -> None:
    assert json_text({1: [float("inf"), np.float64("nan"), np.arange(2)], "a": "\x9b"}).split() == (
        ["{", '"1":', "[", "null,", "null,", "[", "0,", "1", "]", "],", '"a":', '"\\u009b"', "}"]
    )


def test_a_line_is_one_line_that_a_terminal_does_not_obey() -> None:
    assert one_line("a\x1b[2J\n\u202eb\r\nc") == "a\N{REPLACEMENT CHARACTER}[2J \N{REPLACEMENT CHARACTER}b c"
    assert one_line("\udcff\x85\u2028") == 3 * "\N{REPLACEMENT CHARACTER}"


def test_a_long_line_keeps_its_ends() -> None:
    shown = one_line("a" * 16_000_000 + " is not an atlas")
    assert len(shown) <= 1000
    assert shown.startswith("aaa")
    assert shown.endswith("a is not an atlas")
    assert [len(one_line("abcdefgh", longest)) for longest in (8, 7, 4, 3)] == [8, 7, 4, 3]


@pytest.mark.parametrize("start", FORMULA_STARTS)
def test_no_writer_of_csv_writes_a_formula(start, tmp_path) -> None:
    text = f'{start}HYPERLINK("http://x")'
    assert spreadsheet_text(text) == f"'{text}"
    assert _texts(np.array([text])) == [f"'{text}"]
    write_table(tmp_path / "a.csv", {"name": np.array([text]), "value": np.array([-1.5])})
    results = Results(tmp_path / "r", "kind", {}, ["name", "value"], ["name"])
    results.add({"name": text, "value": -1.5})
    for path in (tmp_path / "a.csv", tmp_path / "r" / CSV_FILE):
        with path.open(newline="") as stream:
            assert list(csv.reader(stream)) == [["name", "value"], [f"'{text}", "-1.5"]]


def test_plain_text_stays_in_a_spreadsheet() -> None:
    assert [spreadsheet_text(text) for text in ("", "lp", "a=b", "0-3")] == ["", "lp", "a=b", "0-3"]


def test_markup_in_names_stays_text() -> None:
    assert markdown.table(["a"], [["<b>|`x`\n#"]]) == "| a |\n| --- |\n| &lt;b>\\|\\`x\\` # |"
    assert html.table(["<i>"], [['"<b>\x1b&']]) == (
        "<table>\n<tr><th>&lt;i&gt;</th></tr>\n<tr><td>&quot;&lt;b&gt;\N{REPLACEMENT CHARACTER}&amp;</td></tr>\n</table>"
    )
    assert html.table([], [["1"]]) == "<table>\n<tr><td>1</td></tr>\n</table>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("snake_case __dunder__ *a*", r"snake_case \__dunder_\_ \*a\*"),
        ("![x](y) [z]", r"!\[x\](y) \[z\]"),
        ("<img src=x> &lt; AT&T ~~s~~ $x$", r"&lt;img src=x> \&lt; AT&T \~\~s\~\~ \$x\$"),
        ("see https://a.b/`c` www.a.b mail@a.b @octocat a@b", "see `https://a.b/'c'` `www.a.b` `mail@a.b` `@octocat` `a@b`"),
        ("[x](https://a.b) owner/repo#1 model @ c0ffee #", "`[x](https://a.b)` `owner/repo#1` model @ c0ffee #"),
        ("a\n# b", "a # b"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_a_text_in_markdown_has_no_markup(text: str, shown: str) -> None:
    assert markdown.inline(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("# a", r"\# a"), ("1. a", r"1\. a"), ("- a", r"\- a"), ("---", r"\---"), ("> a", r"\> a"), ("1.5 a", "1.5 a"), ("a", "a")],
)
def test_a_paragraph_is_no_heading_list_or_rule(text: str, shown: str) -> None:
    assert markdown.paragraph(text) == shown


def test_code_in_markdown_stays_code() -> None:
    assert markdown.code("a`b`|c\nd") == "`a'b'/c d`"
    assert markdown.code("\n") == ""
    assert markdown.fenced("a```\n# b") == "a''' # b"


def test_names_that_look_alike_stay_apart() -> None:
    assert distinct_lines(["a", "b"]) == {"a": "a", "b": "b"}
    assert distinct_lines(["a\nb", "a b", "a b (2)"]) == {"a\nb": "a b (3)", "a b": "a b", "a b (2)": "a b (2)"}
    names = ["\x07", "\x1b", "\x1c", "x" * 5000, "x" * 5001]
    found = distinct_lines(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert found == distinct_lines(reversed(names))
