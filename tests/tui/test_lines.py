"""Lines of text: which cells are painted again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tui.widgets.lines import difference

if TYPE_CHECKING:
    from tui.widgets.lines import Line


@pytest.mark.parametrize(
    ("before", "after", "cells"),
    [
        ([("row 1 of 9", "")], [("row 1 of 9", "")], range(0)),
        ([("row 1 of 9", "")], [("row 2 of 9", "")], range(4, 5)),
        ([("row 1 of ", ""), ("9", "dim")], [("row 1 of 9", "")], range(9, 10)),
        ([("row ", ""), ("1", "")], [("row 1", "")], range(0)),
        ([("ab", "")], [("abcd", "")], range(2, 4)),
        ([("abcd", "")], [], range(4)),
        ([("a" * 30, "")], [("a" * 29 + "b", "")], range(0)),
        ([("a" * 19 + "cd", "")], [("a" * 19 + "ef", "")], range(19, 20)),
        ([("字 1", "")], [("字 2", "")], range(20)),
    ],
)
def test_only_what_differs(before: Line, after: Line, cells: range) -> None:
    assert difference(before, after, 20) == cells
