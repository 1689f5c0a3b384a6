"""A table that renders only the visible lines, so a million rows cost nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.widgets.text import left, right

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from rich.style import Style
    from textual import events

CONTEXT = 2
"""Rows that stay visible above and below the cursor."""
MAX_COUNT_DIGITS = 7


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: The name by which the table knows the column.
        heading: The text above the column.
        width: Cells, without the gap before the column.
        at_left: Whether heading and cells begin at the left of the column. If not, they end at its right.
        scale: The value at the right end of the column's bars, shown there in the heading if there is room.
    """

    key: str
    heading: str
    width: int
    at_left: bool = False
    scale: str = ""

    def titled(self, text: str) -> str:
        """The heading ``text``, with the scale at the right end of the column."""
        gap = self.width - cell_len(text) - len(self.scale)
        return f"{text}{' ' * gap}{self.scale}" if self.scale and gap > 0 else text

    def aligned(self, text: str) -> str:
        """``text`` in the cells of the column."""
        return left(text, self.width) if self.at_left else right(text, self.width)


class LineTable(ScrollView, can_focus=True, inherit_bindings=False):
    """Rows under a fixed heading, with a cursor, a marked column, and movement keys with counts as in vi.

    Subclasses define the cells of a row with `cells`, and may fill the rest of the line with `tail`.

    Attributes:
        columns: All columns.
        frozen: Number of columns, from the left, that stay when the user scrolls columns.
        row_count: Number of rows.
        sort_key: Key of the column that orders the rows.
        descending: Whether the largest value is first.
        marked: Key of the marked column, by which the keys s and S sort.
        cursor: The row under the cursor.
        count: The digits typed before a key.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "line-table--heading",
        "line-table--marked",
        "line-table--cursor",
        "line-table--super",
        "line-table--halo",
        "line-table--lost",
    }
    DEFAULT_CSS = """
    LineTable {
        scrollbar-size-vertical: 1;
        overflow-x: hidden;
        & > .line-table--heading { color: $text-muted; }
        & > .line-table--marked { text-style: bold underline; }
        & > .line-table--cursor { background: $primary 40%; color: $text; text-style: bold; }
        & > .line-table--super { color: $text-warning; }
        & > .line-table--halo { color: $text-primary; }
        & > .line-table--lost { color: $text-error; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "move(1)", "down", show=False, tooltip="down (12{key}: twelve rows)", id="down"),
        Binding("down", "move(1)", "down", show=False, tooltip="down (12{key}: twelve rows)"),
        Binding("k", "move(-1)", "up", show=False, tooltip="up", id="up"),
        Binding("up", "move(-1)", "up", show=False, tooltip="up"),
        Binding("g", "top", "top", show=False, tooltip="first row (12{key}: row 12)", id="top"),
        Binding("home", "top", "top", show=False, tooltip="first row (12{key}: row 12)"),
        Binding("G", "bottom", "bottom", show=False, tooltip="last row (12{key}: row 12)", id="bottom"),
        Binding("end", "bottom", "bottom", show=False, tooltip="last row (12{key}: row 12)"),
        Binding("ctrl+d", "page(0.5)", "half page down", show=False, tooltip="half a page down", id="half-page-down"),
        Binding("ctrl+u", "page(-0.5)", "half page up", show=False, tooltip="half a page up", id="half-page-up"),
        Binding("pagedown", "page(1.0)", "page down", show=False, tooltip="a page down", id="page-down"),
        Binding("pageup", "page(-1.0)", "page up", show=False, tooltip="a page up", id="page-up"),
        Binding("h", "scroll_columns(-1)", "left", show=False, tooltip="columns to the left", id="left"),
        Binding("left", "scroll_columns(-1)", "left", show=False, tooltip="columns to the left"),
        Binding("l", "scroll_columns(1)", "right", show=False, tooltip="columns to the right", id="right"),
        Binding("right", "scroll_columns(1)", "right", show=False, tooltip="columns to the right"),
        Binding("s", "sort(True)", "sort", tooltip="sort, largest first", id="sort"),
        Binding("S", "sort(False)", "sort up", show=False, tooltip="sort, smallest first", id="sort-ascending"),
        Binding("comma", "mark_column(-1)", "mark left", show=False, tooltip="mark the column left", id="column-left"),
        Binding("full_stop", "mark_column(1)", "mark right", show=False, tooltip="mark the column right", id="column-right"),
        *(Binding(digit, f"digit('{digit}')", show=False) for digit in "0123456789"),
        Binding("escape", "clear_count", show=False),
    ]

    cursor: reactive[int] = reactive(0, init=False, repaint=False)
    count: reactive[str] = reactive("", init=False, repaint=False)

    class RowsReplaced(Message):
        """The table has new rows, and another row is under the cursor."""

    class Opened(Message):
        """The user clicked the row under the cursor."""

    class CountTyped(Message):
        """The user typed a count, or a key has used the count."""

    class ColumnMarked(Message):
        """Another column is marked."""

    def __init__(self, *, sort_key: str, descending: bool, marked: str) -> None:
        super().__init__(id="table")
        self.columns: tuple[Column, ...] = ()
        self.frozen = 1
        self.row_count = 0
        self.sort_key = sort_key
        self.descending = descending
        self.marked = marked
        self._offset = 0
        self._styles: dict[str, Style] = {}

    # What subclasses define.

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        """Text and style (``""``, ``super``, ``halo`` or ``lost``) of ``columns`` of ``row``."""
        raise NotImplementedError

    def shown(self) -> dict[str, np.ndarray]:
        """Name to values in the order of the rows, (row,): every column, and what else names a row."""
        raise NotImplementedError

    def sort(self) -> None:
        """Sort the rows by ``sort_key`` and ``descending``, and put the cursor on the first row."""
        raise NotImplementedError

    def tail(self, row: int, width: int, base: Style) -> list[Segment]:
        """What follows the columns of ``row``, at most ``width`` cells."""
        return []

    def tail_heading(self, width: int) -> str:
        """The heading over `tail`."""
        return ""

    # What screens use.

    def set_columns(self, columns: tuple[Column, ...], frozen: int) -> None:
        """Replace the columns. If the marked or the sorting column is gone, the last frozen column takes its part."""
        self.columns = columns
        self.frozen = frozen
        keys = [column.key for column in columns]
        if self.marked not in keys:
            self.marked = keys[frozen - 1]
        if self.sort_key not in keys:
            self.sort_key = keys[frozen - 1]
        self._offset = min(self._offset, len(columns) - frozen - 1)
        self.refresh()

    def set_rows(self, count: int, cursor: int) -> None:
        """Replace all rows by ``count`` new rows, with the cursor on row ``cursor``."""
        self.row_count = count
        self.virtual_size = Size(0, count + 1)
        self.set_reactive(LineTable.cursor, max(0, min(cursor, count - 1)))
        self._show_cursor()
        self.refresh()
        self.post_message(self.RowsReplaced())

    def take_count(self) -> int | None:
        """The count typed before this key, or None. The count is used up."""
        count, self.count = self.count, ""
        return int(count) if count else None

    def to_counted_row(self) -> None:
        """Put the cursor on the row whose number was typed before this key, if one was."""
        count = self.take_count()
        if count is not None:
            self.go_to(count - 1)

    @property
    def shown_columns(self) -> list[Column]:
        """Columns that fit into the width, from the left."""
        return self._columns_in(self.row_width)

    def _columns_in(self, width: int) -> list[Column]:
        room = width - 1
        shown: list[Column] = []
        for column in (*self.columns[: self.frozen], *self.columns[self.frozen + self._offset :]):
            room -= column.width + 1
            if room < 0 and shown:
                break
            shown.append(column)
        return shown

    @property
    def row_width(self) -> int:
        """Cells in a line, without the scrollbar."""
        return self.scrollable_size.width

    @property
    def page_rows(self) -> int:
        """Rows that fit into the height."""
        return max(1, self.size.height - 1)

    # Painting.

    def style(self, name: str) -> Style:
        """The component style ``name``, or the style of the table for ``""``. It is cached until the theme changes."""
        if name not in self._styles:
            self._styles[name] = self.get_component_rich_style(f"line-table--{name}") if name else self.rich_style
        return self._styles[name]

    def notify_style_update(self) -> None:
        self._styles.clear()
        super().notify_style_update()

    def render_line(self, y: int) -> Strip:
        row, width = y - 1 + self.scroll_offset.y, self.row_width
        if y == 0:
            segments, base = self._heading(width), self.style("heading")
        elif row < self.row_count:
            segments, base = self._row(row, width), self.style("cursor" if row == self.cursor else "")
        else:
            segments, base = [], self.style("")
        return Strip(segments).adjust_cell_length(width, base).simplify()

    def _heading(self, width: int) -> list[Segment]:
        heading = self.style("heading")
        segments = [Segment(" ", heading)]
        used = 1
        for column in self._columns_in(width):
            arrow = ("▾" if self.descending else "▴") if column.key == self.sort_key else ""
            text = f"{column.heading}{arrow}"
            if column.key == self.marked:
                padded = column.aligned(column.titled(text))
                before, _, after = padded.partition(text)
                segments += [Segment(f"{before}›", heading), Segment(text, self.style("marked")), Segment(after, heading)]
            else:
                segments.append(Segment(f" {column.aligned(column.titled(text))}", heading))
            used += column.width + 1
        segments.append(Segment(self.tail_heading(width - used), heading))
        return segments

    def _row(self, row: int, width: int) -> list[Segment]:
        on_cursor = row == self.cursor
        base = self.style("cursor" if on_cursor else "")
        columns = self._columns_in(width)
        text = "▶" if on_cursor else " "
        segments = []
        for column, (cell, style) in zip(columns, self.cells(row, columns), strict=True):
            padded = f" {column.aligned(cell)}"
            if style and not on_cursor:
                segments += [Segment(text, base), Segment(padded, self.style(style))]
                text = ""
            else:
                text += padded
        segments.append(Segment(text, base))
        used = 1 + sum(column.width + 1 for column in columns)
        return segments + self.tail(row, width - used, base)

    # Movement.

    def watch_cursor(self, old: int, new: int) -> None:
        if old == new:
            return
        self.refresh_lines(old + 1)
        self.refresh_lines(new + 1)
        self._show_cursor()

    def watch_count(self) -> None:
        self.post_message(self.CountTyped())

    def on_resize(self) -> None:
        self.virtual_size = Size(0, self.row_count + 1)
        self._show_cursor()

    def go_to(self, row: int) -> None:
        """Put the cursor on ``row``, or on the nearest row that exists."""
        self.cursor = max(0, min(row, self.row_count - 1))

    def _show_cursor(self) -> None:
        context = min(CONTEXT, (self.page_rows - 1) // 2)
        first = self.scroll_offset.y
        top = min(first, self.cursor - context)
        top = max(top, self.cursor + context + 1 - self.page_rows)
        self._scroll_rows(top)

    def _scroll_rows(self, top: int) -> None:
        if top != self.scroll_offset.y:
            self.scroll_to(y=top, animate=False)

    # A digit is a binding because bindings handle fast keys in order. `on_key` would handle a digit before the earlier key.
    def action_digit(self, digit: str) -> None:
        if self.count or digit != "0":
            self.count = (self.count + digit)[:MAX_COUNT_DIGITS]

    def action_clear_count(self) -> None:
        self.count = ""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave escape to the screen if there is no count."""
        return bool(self.count) if action == "clear_count" else True

    def action_move(self, step: int) -> None:
        self.go_to(self.cursor + step * (self.take_count() or 1))

    def action_top(self) -> None:
        self.go_to((self.take_count() or 1) - 1)

    def action_bottom(self) -> None:
        self.go_to((self.take_count() or self.row_count) - 1)

    def action_page(self, pages: float) -> None:
        rows = max(1, round(abs(pages) * self.page_rows)) * (self.take_count() or 1)
        step = rows if pages > 0 else -rows
        self._scroll_rows(self.scroll_offset.y + step)
        self.go_to(self.cursor + step)

    def action_scroll_columns(self, step: int) -> None:
        last = len(self.columns) - self.frozen - 1
        self._offset = max(0, min(self._offset + step * (self.take_count() or 1), last))
        self.refresh()

    # Sorting.

    def action_sort(self, descending: bool) -> None:
        self.sort_key = self.marked
        self.descending = descending
        self.sort()

    def action_mark_column(self, step: int) -> None:
        keys = [column.key for column in self.columns]
        place = max(0, min(keys.index(self.marked) + step * (self.take_count() or 1), len(keys) - 1))
        self.marked = keys[place]
        if place >= self.frozen:
            self._offset = min(self._offset, place - self.frozen)
            while self._offset < place - self.frozen and self.marked not in [item.key for item in self.shown_columns]:
                self._offset += 1
        self.refresh()
        self.post_message(self.ColumnMarked())

    def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            self._click_heading(event.x)
            return
        row = event.y - 1 + self.scroll_offset.y
        if row >= self.row_count:
            return
        if row == self.cursor:
            self.post_message(self.Opened())
        self.go_to(row)

    def _click_heading(self, x: int) -> None:
        end = 1
        for column in self.shown_columns:
            end += column.width + 1
            if x < end:
                self.marked = column.key
                self.action_sort(not self.descending if column.key == self.sort_key else True)
                return
