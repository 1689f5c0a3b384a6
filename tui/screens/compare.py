"""Two atlases of one architecture, FFN by FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from chanfmt.algebra.compare import medians
from chanfmt.base.text import one_line
from tui.screens.base import BACK_BINDINGS, METRIC_BINDINGS, common_bindings
from tui.screens.ffns import FfnScreen
from tui.session.comparing import Comparing
from tui.session.comparison import join
from tui.widgets.compare_table import CompareTable
from tui.widgets.text import number, percent, wrapped

if TYPE_CHECKING:
    from chanfmt.algebra.compare import Note
    from tui.session.place import Opening
    from tui.session.session import Session
    from tui.widgets.lines import Line


class CompareScreen(FfnScreen):
    """The numbers of ``atlas compare``. If the view to open is a join, the join opens as soon as there are numbers.

    Attributes:
        comparing: The comparison, which the join also shows.
    """

    SCREEN = "compare"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "join", tooltip="join the layer's channels", id="open"),
        Binding("d", "ratio", "diff/ratio", tooltip="difference or ratio", id="ratio"),
        Binding("x", "swap", "swap", tooltip="swap A and B", id="swap-atlases"),
        *(item for item in METRIC_BINDINGS if item.key == "m"),
        *common_bindings("compare"),
        *BACK_BINDINGS,
    ]
    table: CompareTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, CompareTable(session.browser.snapshot), opening.ffn)
        self.comparing = Comparing(session)
        # The join needs the numbers, so it waits for them.
        self._join_filter = opening.place.filter if opening.place.screen == "join" else None

    @property
    def swapped(self) -> bool:
        return self.comparing.swapped

    def show_browser(self) -> None:
        self.comparing.compute(self.browser.metric)

    def show_comparison(self) -> None:
        self._show()
        if self._join_filter is not None and self.table.row_count:
            self.open("join", filter=self._join_filter)
        self._join_filter = None

    def _show(self) -> None:
        comparison = self.comparing.comparison
        first = comparison.first.snapshot if comparison else self.browser.snapshot
        self.table.show(first, comparison, first.nearest(self.record))
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        a, b = (one_line(snapshot.path.name) for snapshot in self.comparing.pair)
        return f"A {a}   B {b}   {len(self.browser.snapshot.blocks)} FFNs", f"{self.browser.heading}  compare"

    def status_text(self) -> str:
        if self.comparing.refusal or not self.table.row_count:
            return one_line(self.comparing.refusal)
        assert self.table.comparison is not None
        item, middle = self.table.comparison.rows[self.table.place], medians(self.table.comparison.rows)
        return (
            f"L{item.layer}: captured {percent(item.captured)} (chance {percent(item.captured_chance)})   "
            f"median: ρ {number(middle['correlation'])}, Jaccard {number(middle['supernode_jaccard'])} "
            f"(chance {number(middle['supernode_chance'], 2)})"
        )

    def legend_line(self, width: int) -> Line:
        if self._notes and not self.has_class("-wide"):
            return [(f" note: {'; '.join(note.short for note in self._notes)}", "dim")]
        change = "B/A: ratio of the shares" if self.table.as_ratio else f"full bar: {100 * self.table.largest_change:.1f} points"
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
        notes = [line for note in self._notes for line in wrapped(f"note: {one_line(note.sentence)}", width - 1)]
        lost = [channel for channel in joined.first.order if joined.words["only-A"][channel]]
        room = max(0, height - 14 - len(notes))
        fields = [
            ("ρ", number(item.correlation, 4)),
            ("supernodes", f"A {item.supernodes_first:,}  B {item.supernodes_second:,}"),
            ("shared", f"{item.supernodes_shared:,}"),
            ("Jaccard", number(item.supernode_jaccard)),
            ("by chance", number(item.supernode_chance, 2)),
            ("captured", f"{percent(item.captured)} of A's  (chance {percent(item.captured_chance)})"),
            ("halo Jaccard", f"{number(item.halo_jaccard)}  (chance {number(item.halo_chance, 2)})"),
        ]
        return [
            [(f"layer {item.layer}", "strong"), (f"  {one_line(item.module)}", "dim")],
            *([(f" {name:<15}", "dim"), (value, "")] for name, value in fields),
            *([(f" {line}", "dim")] for line in notes),
            [],
            [("supernodes of A that B lacks", "dim")],
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
        a, b = (str(snapshot.path) for snapshot in self.comparing.pair)
        metric = [] if self.browser.metric == "lp" else ["--metric", self.browser.metric]
        return " ".join(["atlas", "compare", a, b, *metric]) + "\n"

    def action_ratio(self) -> None:
        self.table.as_ratio = not self.table.as_ratio
        self.table.layout_columns()
        self.paint()

    def action_swap(self) -> None:
        self.comparing.swap(self.browser.metric)
        self._show()

    def action_open(self) -> None:
        self.table.to_counted_row()
        if self.table.row_count:
            self.open("join")
