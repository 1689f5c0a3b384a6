"""A screen with a table: title, table and panel, legend, status, a line to type in, keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Horizontal
from textual.widgets import Input, Label

from chanfmt.base.files import output_path
from chanfmt.base.text import one_line
from tui.screens.keys import key_line, key_rows
from tui.screens.status import StatusScreen
from tui.session import view
from tui.session.export import FORMATS, write_table
from tui.session.place import QUERY, Place
from tui.session.registry import REGISTRY, ROW_OF
from tui.widgets.line_table import LineTable
from tui.widgets.lines import Line, Lines
from tui.widgets.text import spread

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from textual.app import ComposeResult

    from tui.session.measuring import Wish
    from tui.session.session import Session
METRIC_BINDINGS: list[Binding] = [
    Binding("i", "axis", "rank/idx", tooltip="x axis: log rank or index", id="axis"),
    Binding("m", "metric", "metric", tooltip="choose the metric", id="metric"),
]
"""Keys of the screens that show one metric."""
MEASURE_BINDING = Binding("M", "measure", "measure", show=False, tooltip="measure the marked channels", id="measure")
BACK_BINDINGS: list[Binding] = [
    Binding("q", "back", "back", tooltip="back", id="back"),
    Binding("escape", "back", "back", tooltip="back"),
]


def common_bindings(name: str) -> list[Binding]:
    """The keys that the screen ``name`` shares with every screen with a table."""
    here = (name, ROW_OF[name].on)
    return [
        Binding("slash", "find", "find", tooltip="find", id="find"),
        Binding("n", "find_next(1)", "next", show=False, tooltip="find the next", id="find-next"),
        Binding("N", "find_next(-1)", "previous", show=False, tooltip="find the previous", id="find-previous"),
        Binding("y", "copy", "copy", tooltip="copy the row or command", id="copy"),
        *(
            # The key line of the other screens has no room for the query.
            Binding(
                row.key,
                f"visit('{row.name}')",
                row.word,
                show=row.name != QUERY or name == "overview",
                tooltip=row.sentence,
                id=row.name,
            )
            for row in REGISTRY
            if row.key and row.name not in here
        ),
        Binding("u", "undo", "undo", show=False, tooltip="undo a mark", id="undo"),
        Binding("R", "redo", "redo", show=False, tooltip="redo a mark", id="redo"),
        Binding("e", "export", "export", show=False, tooltip="export to a file", id="export"),
        Binding("W", "write_marks", "write", show=False, tooltip="write the protect file", id="write-marks"),
    ]


class BrowserScreen(StatusScreen):
    """A table of the atlas. Subclasses define the lines around the table and what a search finds."""

    AUTO_FOCUS = "#table"
    TABLE: ClassVar[type[LineTable]] = LineTable
    """The class of the table, or a parent that has all its keys."""
    FIND_HINT: ClassVar[str]
    """What the user may search for."""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (14, "-tall")]  # noqa: RUF012

    def __init__(self, session: Session, table: LineTable) -> None:
        super().__init__(session)
        self.table = table
        self.query_text = ""
        self._answer: Callable[[str], object] = self._find
        self._preview: Callable[[str], str] | None = None
        self._refusal: Callable[[str], str] | None = None

    @property
    def place(self) -> Place:
        snapshot = self.browser.snapshot
        ffn = snapshot.ffns[self.ffn]
        return Place(
            self.SCREEN,
            ffn.layer_index,
            ffn.stack if snapshot.several_stacks else None,
            metric=self.browser.metric,
            by_index=not self.browser.log_axis,
        )

    # What subclasses define.

    @property
    def span(self) -> range:
        """The FFNs that the cursor is on or in: one FFN, or a whole block."""
        return range(self.ffn, self.ffn + 1)

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on ``ffn``, if ``ffn`` has a row."""
        raise NotImplementedError

    def show_marks(self) -> None:
        self.table.refresh()
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        """Text at the left and at the right end of the title line."""
        raise NotImplementedError

    def headline_text(self, width: int) -> str:
        """The most important fact, at most ``width`` cells, for a line of its own below the title; empty for none."""
        return ""

    def panel_lines(self, width: int, height: int) -> list[Line]:
        """The side panel, at most ``height`` lines of ``width`` cells."""
        raise NotImplementedError

    def legend_line(self, width: int) -> Line:
        """The line below the table, ``width`` cells."""
        raise NotImplementedError

    def copy_text(self) -> str:
        """What the key y copies: usually the row under the cursor as tab-separated names and values."""
        raise NotImplementedError

    def matches(self, query: str) -> np.ndarray:
        """Rows that ``query`` finds, bool (row,), in the order shown."""
        raise NotImplementedError

    # Painting.

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        yield Lines(id="headline")
        with Horizontal(id="body"):
            yield self.table
            yield Lines(id="panel")
        yield Lines(id="legend")
        yield Lines(id="status")
        find = Input(id="find", compact=True, select_on_focus=False)
        find.cursor_blink = False
        with Horizontal(id="find-line"):
            yield Label(id="prompt")
            yield find
            yield Label(id="preview", markup=False)
        yield Lines(id="keys")

    def paint(self) -> None:
        width = self.size.width
        left, right = self.title_texts()
        self.lines("title").show([(spread(f" {left}", f"{right} ", width), "")])
        headline = self.headline_text(width)
        self.lines("headline").display = bool(headline)
        self.lines("headline").show([(f" {headline}", "strong")])
        self.paint_cursor()
        self.paint_legend()
        self.lines("keys").show(key_line(key_rows(self), width))

    def paint_cursor(self) -> None:
        """Bring the lines about what is under the cursor up to date."""
        self.paint_status()
        panel = self.lines("panel")
        panel.show(*(self.panel_lines(panel.size.width, panel.size.height) if panel.display else ()))

    def paint_legend(self) -> None:
        """Bring the line below the table up to date."""
        legend = self.lines("legend")
        legend.show(*([self.legend_line(self.size.width)] if legend.display else ()))

    def status_end(self) -> str:
        return f"count {self.table.count}_" if self.table.count else super().status_end()

    def on_mount(self) -> None:
        self.show_browser()
        # A message would come after the frame that shows the cursor, and would cost a second frame.
        self.watch(self.table, "cursor", self.paint_cursor, init=False)

    def on_line_table_rows_replaced(self) -> None:
        self.paint()

    def on_line_table_column_marked(self) -> None:
        self.paint()

    def on_line_table_count_typed(self) -> None:
        self.paint_status()

    # Actions.

    def action_axis(self) -> None:
        self.browser.log_axis = not self.browser.log_axis
        self.table.refresh()
        self.paint()

    def action_metric(self) -> None:
        self.session.choose_metric()

    def action_copy(self) -> None:
        self.front.copy(self.copy_text())
        self.say("copied")

    def action_export(self) -> None:
        if self.table.row_count:
            place = self.place
            of_one = (
                ""
                if ROW_OF[self.SCREEN].about == "model"
                else f"-L{place.layer}" + ("" if place.expert is None else f"e{place.expert}")
            )
            stem = self.browser.snapshot.path.name.partition(".")[0]
            self.ask(
                self.key("export"),
                f"a file that ends in {', '.join(FORMATS)}",
                self._export,
                f"{stem}-{place.screen}{of_one}.csv",
            )

    def _export(self, name: str) -> None:
        if name:
            self.front.start(
                lambda: write_table(output_path(name), self.table.shown()),
                lambda rows: self.session.say(one_line(f"wrote {rows:,} rows to {name}")),
                refused=self.session.say,
                group="export",
            )

    def ask(
        self,
        prompt: str,
        hint: str,
        answer: Callable[[str], object],
        value: str = "",
        *,
        preview: Callable[[str], str] | None = None,
        refusal: Callable[[str], str] | None = None,
    ) -> None:
        """Let the user type a line, and call ``answer`` with the line.

        Args:
            prompt: The text before the line.
            hint: What the user may type, shown while the line is empty.
            value: The text that the line starts with.
            preview: Computes a remark about the line, shown while the user types.
            refusal: Says why the line is no answer, or nothing. The user may then correct the line.
        """
        self._answer, self._preview, self._refusal = answer, preview, refusal
        self.query_one("#prompt", Label).update(prompt)
        find = self.query_one("#find", Input)
        find.placeholder = hint
        find.value = value
        find.cursor_position = len(value)
        self._show_preview(value)
        self.add_class("-finding")
        find.focus()

    def close_find(self) -> None:
        """Close the line to type in."""
        self.remove_class("-finding")
        self.table.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show_preview(event.value)

    def _show_preview(self, text: str) -> None:
        self._remark(self._preview(text.strip()) if self._preview else "")

    def _remark(self, remark: str) -> None:
        label = self.query_one("#preview", Label)
        label.display = bool(remark)
        label.update(remark)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        reason = self._refusal(text) if self._refusal else ""
        if reason:
            self._remark(reason)
            return
        self.close_find()
        self._answer(text)

    def action_find(self) -> None:
        self.ask(self.key("find"), self.FIND_HINT, self._find)

    def _find(self, text: str) -> None:
        self.query_text = text or self.query_text
        self.action_find_next(1)

    def action_find_next(self, step: int) -> None:
        if not self.query_text:
            self.say(f"nothing to find: press {self.key('find')} first")
            return
        for _ in range(self.table.take_count() or 1):
            row = view.next_match(self.matches(self.query_text), self.table.cursor, step)
            if row is None:
                self.say(f"not found: {self.query_text}")
                return
            self.table.go_to(row)

    def action_escape(self) -> None:
        """Close the line to type in."""
        self.close_find()

    def action_back(self) -> None:
        if self.has_class("-finding"):
            self.close_find()
        else:
            self.front.leave(self.span)

    def come_back(self, span: range) -> None:
        if self.ffn not in span:
            self.show_ffn(span[0])

    def action_visit(self, name: str) -> None:
        """Go to the screen ``name``; ask for a second atlas first, if the screen needs one."""
        row = ROW_OF[name]
        if row.needs_other and self.session.other is None:
            self.ask(
                self.key(f"visit('{name}')"),
                "file of another atlas of this architecture, or hf://REPO/FILE",
                self.session.compare_with,
            )
        else:
            self.front.visit(name)

    def action_redo(self) -> None:
        self.session.marking.redo()

    def action_write_marks(self) -> None:
        self.session.marking.write()

    def action_measure(self) -> None:
        """Ask for model, text and size, and measure the marked channels; or offer to stop the measurement that runs."""
        measuring = self.session.measuring
        reason = measuring.refusal()
        if measuring.running:
            measuring.offer_to_stop()
        elif reason:
            self.say(reason)
        else:
            hint = f"Hub id, directory or .gguf file of {self.browser.snapshot.model_id}"
            self.ask("model", hint, self._measure_on, measuring.wish.model, refusal=lambda text: "" if text else "name the model")

    def _measure_on(self, model: str) -> None:
        hint = "text to measure: wikitext2, c4, pydoc, or a .txt, .jsonl or .parquet file"
        wish = replace(self.session.measuring.wish, model=model)
        self.ask(
            "text",
            hint,
            lambda data: self._measure_up_to(replace(wish, data=data)),
            wish.data,
            refusal=lambda text: "" if text else "name a text",
        )

    def _measure_up_to(self, wish: Wish) -> None:
        measuring = self.session.measuring
        channels = measuring.marked
        self.ask(
            "tokens",
            "tokens to measure on; 0: the whole text",
            lambda text: measuring.begin(replace(wish, max_tokens=int(text))),
            str(wish.max_tokens),
            preview=lambda _: f"for each of {channels:,} ch, in blocks of {wish.seq_len}",
            refusal=lambda text: "" if text.isdecimal() else "a number, or 0",
        )

    def action_open(self) -> None:
        """Open what is under the cursor."""
        raise NotImplementedError

    def on_line_table_opened(self) -> None:
        self.action_open()
