"""The channels of one block in two atlases, joined by their ids."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from chanfmt.base.errors import UsageError
from chanfmt.base.text import one_line
from chanfmt.format import schema
from tui.screens.base import BACK_BINDINGS, BrowserScreen, common_bindings
from tui.session import view
from tui.session.comparison import Joined, join
from tui.session.filter import counted, filtered, refusal
from tui.widgets.join_table import JoinTable
from tui.widgets.text import left, number

if TYPE_CHECKING:
    import numpy as np

    from tui.session.comparing import Comparing
    from tui.session.place import Opening, Place
    from tui.session.session import Session
    from tui.widgets.lines import Line

HINT = "only-A, only-B, both, super, rank_b>500, ratio<0.1, moved>100"


class JoinScreen(BrowserScreen):
    """Channels of one block in both atlases. The screen below is one with a ``comparing``, which this screen also shows."""

    SCREEN = "join"
    FIND_HINT = "channel id as shown, or a label: super, halo, none"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "neighbour(-1)", "layer", tooltip="previous layer", id="previous-layer"),
        Binding("right_square_bracket", "neighbour(1)", "layer", tooltip="next layer", id="next-layer"),
        Binding("f", "filter", "filter", tooltip="show some channels only", id="filter"),
        *common_bindings("join"),
        *BACK_BINDINGS,
    ]
    table: JoinTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, JoinTable())
        self._comparing: Comparing = opening.below.comparing
        assert self._comparing.comparison is not None, "the screen below opens a join only if it has numbers"
        self._comparison = self._comparing.comparison
        first = self._comparison.first.snapshot
        self._place = first.block_of(first.nearest(session.browser.snapshot.ffns[opening.ffn]))
        self._joined: Joined = join(self._comparison, self._place)
        self.filter_text = opening.place.filter

    @property
    def swapped(self) -> bool:
        return self._comparing.swapped

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
        """Keep the layer: the screens above show one atlas only."""

    def show_browser(self) -> None:
        """Wait for the comparison, which the screen below starts."""
        self._show(channel=self._channel)

    @property
    def _channel(self) -> int | None:
        """The channel under the cursor; None if the table has no rows yet."""
        return self.table.channel if self.table.row_count else None

    def show_comparison(self) -> None:
        """Show the same layer of the new comparison. If there is none, keep the old numbers and say why."""
        comparison, refusal = self._comparing.comparison, self._comparing.refusal
        module = self._comparison.rows[self._place].module
        place = next((place for place, row in enumerate(comparison.rows) if row.module == module), None) if comparison else None
        if comparison is None or place is None:
            self.say(one_line(refusal or f"{module} is not in both atlases any more"))
            return
        self._comparison, self._place = comparison, place
        self._show(channel=self._channel)

    def _show(self, *, channel: int | None = None) -> None:
        """Show the layer with the cursor on ``channel``, or else on the same row."""
        self._joined = join(self._comparison, self._place)
        block, first = self._comparison.first.snapshot.blocks[self._place], self._comparison.first
        width = first.snapshot.ffns[block[0]].n_channels if len(block) > 1 else 0
        self.table.show(self._joined, first.heading, width, keep=self._kept(), channel=channel, row=self.table.cursor)

    def _kept(self) -> np.ndarray | None:
        """Channels that fit the filter, bool (channel,). If no channel fits, clear the filter and return None."""
        if not self.filter_text:
            return None
        try:
            keep = filtered(self.filter_text, self._joined.columns, self._joined.labels[0], self._joined.words)
        except UsageError as error:
            self.say(one_line(f"{error.message}; {error.hint}"))
        else:
            if keep.any():
                return keep
            self.say(one_line(f"no channel here fits {self.filter_text}"))
        self.filter_text = ""
        return None

    def title_texts(self) -> tuple[str, str]:
        row = self._comparison.rows[self._place]
        shown = f"   {self.table.row_count:,} ch" + (f": {self.filter_text}" if self.filter_text else "")
        pair = (self._comparison.first, self._comparison.second)
        a, b = (one_line(browser.snapshot.path.name) for browser in pair)
        return f"A {a}   B {b} ▸ layer {row.layer}{shown}", f"{self._comparison.first.heading}  join"

    def status_text(self) -> str:
        table, joined = self.table, self._joined
        channel = table.channel
        labels = [schema.LABELS.get(int(labels[channel]), "?") for labels in joined.labels]
        return (
            f"row {table.cursor + 1}/{table.row_count}  ch {table.channel_name(channel)}  A {labels[0]}, rank "
            f"{joined.first.rank[channel]}  B {labels[1]}, rank {joined.second.rank[channel]}"
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
            lines.append([(f" {left(name, 18)}{number(a, 4):>10}{number(b, 4):>10}{ratio:>9}", "")])
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
        self.ask(self.key("filter"), HINT, self._filter, self.filter_text, preview=self._count, refusal=self._refused)

    def _count(self, text: str) -> str:
        return counted(text, self._joined.columns, self._joined.labels[0], self._joined.words)

    def _refused(self, text: str) -> str:
        return refusal(text, self._joined.columns, self._joined.labels[0], self._joined.words)

    def _filter(self, text: str) -> None:
        self.filter_text = text
        self._show(channel=self._channel)

    def action_open(self) -> None:
        """Do nothing: no screen shows more about a joined channel."""

    def action_back(self) -> None:
        if self.filter_text and not self.has_class("-finding"):
            self._filter("")
        else:
            super().action_back()
