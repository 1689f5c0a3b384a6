"""Two atlases of one architecture: FFN by FFN, and the channels of one joined by their ids."""

from __future__ import annotations

from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from chanfmt.algebra.compare import medians
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.text import printable
from chanfmt.format import schema
from tui.screens.base import BACK_BINDING, COMMON_BINDINGS, METRIC_BINDINGS, BrowserScreen
from tui.screens.ffns import FfnScreen
from tui.session import view
from tui.session.comparison import Joined, join, make_comparison
from tui.session.filter import counted, filtered
from tui.widgets.compare_table import CompareTable
from tui.widgets.join_table import JoinTable
from tui.widgets.text import number, percent

if TYPE_CHECKING:
    import numpy as np

    from chanfmt.algebra.compare import Note
    from tui.session.comparison import Comparison
    from tui.session.load import Snapshot
    from tui.session.model import Browser
    from tui.session.place import Place
    from tui.widgets.lines import Line

METRIC_ONLY = [item for item in METRIC_BINDINGS if item.key == "m"]
HINT = "only-A, only-B, both, super, rank_b>500, ratio<0.1, moved>100"


class CompareScreen(FfnScreen):
    """The numbers of ``atlas compare``.

    Attributes:
        swapped: Whether the app's atlas is B.

    Args:
        then_join: The filter with which the layer is to be joined as soon as there are numbers; None for not at all.
    """

    SCREEN = "compare"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "join", tooltip="join the channels of the layer"),
        Binding("d", "ratio", "diff/ratio", tooltip="difference or ratio"),
        Binding("x", "swap", "swap", tooltip="swap A and B"),
        *METRIC_ONLY,
        *(item for item in COMMON_BINDINGS if item.key != "c"),
        BACK_BINDING,
    ]
    table: CompareTable

    def __init__(self, browser: Browser, ffn: int, *, then_join: str | None = None) -> None:
        super().__init__(CompareTable(browser.snapshot), ffn)
        self._then_join = then_join
        self._refusal = "comparing"
        self.swapped = False
        self._generation = 0

    def show_browser(self) -> None:
        self._generation += 1
        self._compare(self._generation, *self._pair(), self.browser.metric)

    def _pair(self) -> tuple[Snapshot, Snapshot]:
        """A and B."""
        ours, other = self.browser.snapshot, self.atlas_app.other
        assert other is not None
        return (other, ours) if self.swapped else (ours, other)

    @work(thread=True, exclusive=True, group="compare")
    def _compare(self, generation: int, first: Snapshot, second: Snapshot, metric: str) -> None:
        try:
            comparison = make_comparison(first, second, metric)
        except ChanfmtError as error:
            self.atlas_app.call_from_thread(self._have, generation, None, error.message)
        else:
            self.atlas_app.call_from_thread(self._have, generation, comparison, "")

    def _have(self, generation: int, comparison: Comparison | None, refusal: str) -> None:
        if generation != self._generation:
            return
        self._refusal = refusal
        self._show(comparison)
        for screen in self.atlas_app.screen_stack:
            if isinstance(screen, JoinScreen):
                screen.show_comparison(comparison, refusal)
        if self._then_join is not None and comparison is not None:
            self._join(self._then_join)
        self._then_join = None

    def _show(self, comparison: Comparison | None) -> None:
        first = comparison.first.snapshot if comparison else self.browser.snapshot
        self.table.show(first, comparison, first.nearest(self.record))
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        a, b = (printable(snapshot.path.name) for snapshot in self._pair())
        return f"A {a}   B {b}   {len(self.browser.snapshot.blocks)} FFNs", f"{self.browser.heading}  compare"

    def status_text(self) -> str:
        if self._refusal or not self.table.row_count:
            return printable(self._refusal)
        assert self.table.comparison is not None
        item, middle = self.table.comparison.rows[self.table.place], medians(self.table.comparison.rows)
        return (
            f"layer {item.layer}: captured {percent(item.captured)}, by chance {number(item.supernode_chance, 2)}   "
            f"median: ρ {number(middle['correlation'])}, Jaccard {number(middle['supernode_jaccard'])}"
        )

    def legend_line(self, width: int) -> Line:
        if self._notes and not self.has_class("-wide"):
            return [(f" note: {'; '.join(note.short for note in self._notes)}", "dim")]
        change = "B/A: ratio of the shares" if self.table.as_ratio else "one arrow: 1 point"
        return [(f" ρ: Spearman on {self.browser.heading} ranks   {change}   ∩: supernodes in both", "dim")]

    @property
    def _notes(self) -> tuple[Note, ...]:
        return self.table.comparison.notes if self.table.comparison is not None else ()

    def panel_lines(self, width: int, height: int) -> list[Line]:
        if not self.table.row_count:
            return []
        assert self.table.comparison is not None
        item = self.table.comparison.rows[self.table.place]
        joined = join(self.table.comparison, self.table.place)
        notes = [line for note in self._notes for line in wrap(f"note: {printable(note.sentence)}", max(10, width - 1))]
        lost = [channel for channel in joined.first.order if joined.words["only-A"][channel]]
        room = max(0, height - 14 - len(notes))
        fields = [
            ("ρ", number(item.correlation, 4)),
            ("supernodes", f"A {item.supernodes_first:,}  B {item.supernodes_second:,}"),
            ("shared", f"{item.supernodes_shared:,}"),
            ("Jaccard", number(item.supernode_jaccard)),
            ("by chance", number(item.supernode_chance, 2)),
            ("captured", f"{percent(item.captured)} of A's mass"),
            ("halo Jaccard", f"{number(item.halo_jaccard)}  (chance {number(item.halo_chance, 2)})"),
        ]
        return [
            [(f"layer {item.layer}", "strong"), (f"  {printable(item.module)}", "dim")],
            *([(f" {name:<15}", "dim"), (value, "")] for name, value in fields),
            *([(f" {line}", "dim")] for line in notes),
            [],
            [("supernodes of A that B loses", "dim")],
            [(f" {'ch':>8} {'A rank':>8} {'B rank':>8} {'B/A':>9}", "dim")],
            *(
                [
                    (
                        f" {channel:>8} {joined.first.rank[channel]:>8} {joined.second.rank[channel]:>8} "
                        f"{number(float(joined.ratio[channel])):>9}",
                        "",
                    )
                ]
                for channel in lost[:room]
            ),
        ]

    def copy_text(self) -> str:
        a, b = (str(snapshot.path) for snapshot in self._pair())
        metric = [] if self.browser.metric == "lp" else ["--metric", self.browser.metric]
        return " ".join(["atlas", "compare", a, b, *metric]) + "\n"

    def action_ratio(self) -> None:
        self.table.as_ratio = not self.table.as_ratio
        self.table.layout_columns()
        self.paint()

    def action_swap(self) -> None:
        self.swapped = not self.swapped
        self._refusal = "comparing"
        self._show(None)
        self.show_browser()

    def action_open(self) -> None:
        self._join("")

    def _join(self, filter_text: str) -> None:
        if self.table.row_count:
            assert self.table.comparison is not None
            self.app.push_screen(JoinScreen(self.table.comparison, self.table.place, filter_text))


class JoinScreen(BrowserScreen):
    """Channels of one FFN in both atlases."""

    SCREEN = "join"
    FIND_HINT = "channel id as shown, or a label: super, halo, none"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "neighbour(-1)", "layer", tooltip="previous layer"),
        Binding("right_square_bracket", "neighbour(1)", "layer", tooltip="next layer"),
        Binding("f", "filter", "filter", tooltip="show some channels only"),
        *(item for item in COMMON_BINDINGS if item.key != "c"),
        BACK_BINDING,
    ]
    table: JoinTable

    def __init__(self, comparison: Comparison, place: int, filter_text: str = "") -> None:
        super().__init__(JoinTable())
        self._comparison = comparison
        self._place = place
        self._joined: Joined = join(comparison, place)
        self.filter_text = filter_text

    @property
    def ffn(self) -> int:
        first = self._comparison.first.snapshot
        return self.browser.snapshot.nearest(first.ffns[first.blocks[self._place][0]])

    @property
    def span(self) -> range:
        return self.browser.snapshot.block_around(self.ffn)

    @property
    def place(self) -> Place:
        return replace(super().place, filter=self.filter_text)

    def show_ffn(self, ffn: int) -> None:
        """Stay: what lies above shows the first atlas only."""

    def show_browser(self) -> None:
        """Wait for what the screen below makes of it."""
        self._show(channel=self._channel)

    @property
    def _channel(self) -> int | None:
        """The channel under the cursor, where there is one yet."""
        return self.table.channel if self.table.row_count else None

    def show_comparison(self, comparison: Comparison | None, refusal: str) -> None:
        """Show the same layer of ``comparison``, or what there was and why."""
        module = self._comparison.rows[self._place].module
        place = next((place for place, row in enumerate(comparison.rows) if row.module == module), None) if comparison else None
        if comparison is None or place is None:
            self.say(printable(refusal or f"no {module} any more"))
            return
        self._comparison, self._place = comparison, place
        self._show(channel=self._channel)

    def _show(self, *, channel: int | None = None) -> None:
        """Show the layer, the cursor on ``channel``, or else on the same row."""
        self._joined = join(self._comparison, self._place)
        block, first = self._comparison.first.snapshot.blocks[self._place], self._comparison.first
        width = first.snapshot.ffns[block[0]].n_channels if len(block) > 1 else 0
        self.table.show(self._joined, first.heading, width, keep=self._kept(), channel=channel, row=self.table.cursor)

    def _kept(self) -> np.ndarray | None:
        """Channels that fit the filter, bool (channel,); None, and no filter any more, where it fits none."""
        if not self.filter_text:
            return None
        try:
            keep = filtered(self.filter_text, self._joined.columns, self._joined.labels[0], self._joined.words)
        except UsageError as error:
            self.say(printable(f"{error.message}; {error.hint}"))
        else:
            if keep.any():
                return keep
            self.say(printable(f"no channel here fits {self.filter_text}"))
        self.filter_text = ""
        return None

    def title_texts(self) -> tuple[str, str]:
        row = self._comparison.rows[self._place]
        shown = f"   {self.table.row_count:,} ch" + (f": {self.filter_text}" if self.filter_text else "")
        pair = (self._comparison.first, self._comparison.second)
        a, b = (printable(browser.snapshot.path.name) for browser in pair)
        return f"A {a}   B {b} ▸ layer {row.layer}{shown}", f"{self._comparison.first.heading}  join"

    def status_text(self) -> str:
        table, joined = self.table, self._joined
        channel = table.channel
        labels = [schema.LABELS.get(int(labels[channel]), "?") for labels in joined.labels]
        return (
            f"row {table.cursor + 1:,}/{table.row_count:,}  ch {table.channel_name(channel)}  A {labels[0]}, rank "
            f"{joined.first.rank[channel]:,}  B {labels[1]}, rank {joined.second.rank[channel]:,}"
        )

    def legend_line(self, width: int) -> Line:
        words = {name: int(mask.sum()) for name, mask in self._joined.words.items()}
        return [("  supernodes: " + "  ".join(f"{name} {count:,}" for name, count in words.items()), "dim")]

    def panel_lines(self, width: int, height: int) -> list[Line]:
        channel = self.table.channel
        lines: list[Line] = []
        lines.append([(f"channel {self.table.channel_name(channel)}", "strong")])
        lines.append([(f" {'metric':<18}{'A':>10}{'B':>10}{'B/A':>9}", "dim")])
        pair = (
            (self._comparison.first, self._comparison.first.snapshot.blocks[self._place]),
            (self._comparison.second, self._comparison.counterparts[self._place]),
        )
        for name in self._comparison.first.snapshot.metrics:
            a, b = (float(browser.snapshot.span_values(span, name)[channel]) for browser, span in pair)
            ratio = number(b / a) if a > 0 else "-"
            lines.append([(f" {name:<18}{number(a, 4):>10}{number(b, 4):>10}{ratio:>9}", "")])
        return lines

    def copy_text(self) -> str:
        channel = self.table.channel
        fields = {"layer": self._comparison.rows[self._place].layer, "channel": self.table.channel_name(channel)}
        fields |= {name: values[channel] for name, values in self.table.columns_by_name().items() if name != "channel"}
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"

    def matches(self, query: str) -> np.ndarray:
        named = self.table.named(query)
        return view.match_channels(self._joined.labels[0], query if named is None else str(named))[self.table.order]

    def action_neighbour(self, step: int) -> None:
        last = len(self._comparison.rows) - 1
        self._place = max(0, min(self._place + step * (self.table.take_count() or 1), last))
        self._show()

    def action_filter(self) -> None:
        self.ask("f", HINT, self._filter, self.filter_text, preview=self._count)

    def _count(self, text: str) -> str:
        return counted(text, self._joined.columns, self._joined.labels[0], self._joined.words)

    def _filter(self, text: str) -> None:
        self.filter_text = text
        self._show(channel=self._channel)

    def action_open(self) -> None:
        """Nothing is behind a joined channel."""

    def action_back(self) -> None:
        if self.filter_text and not self.has_class("-finding"):
            self._filter("")
        else:
            super().action_back()
