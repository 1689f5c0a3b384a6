"""One channel: every metric with its rank, its LP in every split, and the dimensions to which it writes."""

from __future__ import annotations

from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from rich.cells import cell_len
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll

from chanfmt.analysis.token_texts import Context
from chanfmt.base.text import one_line
from chanfmt.format.columns import ABLATIONS, OWNER
from tui.screens.keys import key_line, key_rows
from tui.screens.status import StatusScreen
from tui.session.card import labelled, make_card
from tui.session.place import QUERY
from tui.widgets.lines import Line, Lines
from tui.widgets.text import bar, last_cells, left, number, percent, spread, whole_or

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from textual.app import ComposeResult

    from chanfmt.analysis.channel import Card
    from chanfmt.analysis.driving import DrivingToken
    from tui.screens.channels import Channels
    from tui.session.place import Opening, Place
    from tui.session.session import Session

SCROLLBAR = 2
"""Cells at the right that a scrollbar may cover."""


class CardScreen(StatusScreen):
    """The channel under the cursor of the screen below, whose cursor moves along."""

    SCREEN = "card"
    AUTO_FOCUS = "#card-box"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket,h", "neighbour(-1)", "channel", tooltip="previous channel", id="previous-channel"),
        Binding("left", "neighbour(-1)", "channel", tooltip="previous channel"),
        Binding("right_square_bracket,l", "neighbour(1)", "channel", tooltip="next channel", id="next-channel"),
        Binding("right", "neighbour(1)", "channel", tooltip="next channel"),
        Binding("space", "mark", "mark", tooltip="mark or unmark the channel", id="mark"),
        Binding("u", "undo", "undo", show=False, tooltip="undo a mark", id="undo"),
        Binding("y", "copy", "copy", tooltip="copy the card", id="copy"),
        Binding("j", "scroll(1)", "down", show=False, tooltip="down", id="down"),
        Binding("down", "scroll(1)", "down", show=False, tooltip="down"),
        Binding("k", "scroll(-1)", "up", show=False, tooltip="up", id="up"),
        Binding("up", "scroll(-1)", "up", show=False, tooltip="up"),
        Binding("q", "back", "back", tooltip="back", id="back"),
        Binding("escape", "back", "back", tooltip="back"),
    ]

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session)
        self._channels: Channels = opening.below

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        with VerticalScroll(id="card-box", can_focus=True):
            yield Lines(id="card")
        yield Lines(id="status")
        yield Lines(id="keys")

    def on_mount(self) -> None:
        self.paint()

    @property
    def ffn(self) -> int:
        return self._channels.ffn

    @property
    def channel(self) -> int:
        """The channel shown."""
        return self._channels.channel

    @property
    def place(self) -> Place:
        place = replace(self._channels.place, screen=self.SCREEN)
        # The card opens over a layer, which has no place for a filter and an order of all layers.
        return replace(place, filter="", sort="") if self._channels.place.screen == QUERY else place

    def show_marks(self) -> None:
        self.paint()

    def show_browser(self) -> None:
        self.paint()

    def status_text(self) -> str:
        return self._channels.channel_text

    @property
    def _about(self) -> str:
        snapshot = self.browser.snapshot
        ffn = snapshot.ffns[self.ffn].name(with_stack=snapshot.several_stacks)
        return f"{self.session.file_name} ▸ {ffn} ▸ channel {self.channel}"

    def paint(self) -> None:
        snapshot, ffn, width = self.browser.snapshot, self.ffn, self.app.size.width
        self.lines("title").show([(spread(f" {self._about}", "card ", width), "")])
        marked = "   ● protected" if self.session.marks.of(ffn)[self.channel] else ""
        label = labelled(int(snapshot.labels_of(ffn)[self.channel]))
        card = make_card(snapshot, ffn, self.channel)
        types = {name: metric.dtype for name, metric in snapshot.metrics.items()}
        lines = [
            [(f" channel {self.channel}", "strong"), (f"   {label}{marked}", "")],
            *effect_lines(card),
            *self._driving_lines(width - SCROLLBAR),
            *card_lines(card, width - SCROLLBAR, types),
            *about_lines({name: metric.long_name for name, metric in snapshot.metrics.items()}, card, width - SCROLLBAR),
        ]
        body = self.lines("card")
        body.styles.height = len(lines)
        body.show(*lines)
        self.paint_status()
        self.lines("keys").show(key_line(key_rows(self), width))

    def _driving_lines(self, width: int) -> list[Line]:
        tokens, texts = self.browser.snapshot.driving(self.ffn, self.channel), self.session.texts
        contexts = [texts.context(token) for token in tokens]
        return driving_lines(tokens, contexts, texts.state, width)

    def action_neighbour(self, step: int) -> None:
        self._channels.step_channel(step)
        self.paint()

    def action_mark(self) -> None:
        self._channels.mark_channel()

    def action_copy(self) -> None:
        self.front.copy(f"{self._about}\n{self.lines('card').text}\n")
        self.say("copied")

    def action_scroll(self, lines: int) -> None:
        self.query_one("#card-box").scroll_relative(y=lines, animate=False)

    def action_back(self) -> None:
        self.app.pop_screen()


def card_lines(card: Card, width: int, types: Mapping[str, str]) -> list[Line]:
    """``card`` as lines of ``width`` cells. ``types`` are those of the metrics, as in `chanfmt.format.schema.Variable`."""
    # The names of columns are long, and some differ in their last letters.
    names = max(20, min(max((len(item.name) for item in card.metrics), default=0), width - 48))
    bars = max(0, min(30, width - 48 - names))
    lines: list[Line] = [[(f" {left('metric', names)}{'value':>10}{'rank':>8} {'of':>7}{'above':>9}{'x median':>10}", "dim")]]
    for item in card.metrics:
        rank = str(item.rank) if item.rank else "-"
        share = item.below if item.below == item.below else 0.0
        lines.append(
            [
                (
                    f" {left(item.name, names)}{whole_or(item.value, types[item.name], 4):>10}{rank:>8} {item.known:>7,}{percent(item.below, 2):>9}"
                    f"{number(item.times_median):>10}  {bar(share, bars)}",
                    "",
                )
            ]
        )
    lines += [[], *_split_lines(card, width), *_support_lines(card, width), *_nearest_lines(card)]
    return lines


def effect_lines(card: Card) -> list[Line]:
    """What a removal of the channel costs, and where its value is largest, as far as the card has these columns."""
    values = {item.name: item.value for item in card.metrics}
    lines: list[Line] = []
    for name, what in ABLATIONS.items():
        if np.isfinite(values.get(name, np.nan)):
            error = values.get(f"{name}_error", np.nan)
            interval = f" ± {number(error)}" if np.isfinite(error) else ""
            lines.append([(f" {what}: the loss changes by {_signed(values[name])}{interval} nats per token", "")])
    token, position, sequence = (values.get(f"{OWNER}/peak_{name}", np.nan) for name in ("token", "position", "sequence"))
    # -1 stands for a channel that no token reached.
    if token >= 0:
        where = f", position {int(position)}" if position >= 0 else ""
        where += f" of sequence {int(sequence)}" if sequence >= 0 else ""
        lines.append([(f" |u| is largest on the token with the id {int(token)}{where}", "")])
    return [*lines, []] if lines else []


def driving_lines(tokens: Sequence[DrivingToken], contexts: Sequence[Context | None], state: str, width: int) -> list[Line]:
    """The tokens that drive a channel hardest, one below the other in their contexts, in lines of ``width`` cells.

    Args:
        contexts: For each of ``tokens``, its text; None if there is none.
        state: Why there are no texts.
    """
    if not tokens:
        return []
    heading = "driven hardest by" + (f" ({state})" if state and any(token.token is not None for token in tokens) else "")
    lines: list[Line] = [[(left(f" {'u':>9}  {'seq:pos':<9} {heading}", width), "dim")]]
    room = max(20, width - 22)
    for token, context in zip(tokens, contexts, strict=True):
        place = "" if token.sequence is None or token.position is None else f"{token.sequence}:{token.position}"
        before, middle, after = context or _ids(token)
        before, middle = last_cells(before, room // 2 - 1), left(middle, min(cell_len(middle), room // 3))
        after = left(after, room - room // 2 - cell_len(middle) - 1)
        lines.append([(f" {number(token.value, 4):>9}  {left(place, 9)} {before}", ""), (f"»{middle}«", "super"), (after, "")])
    return [*lines, []]


def _ids(token: DrivingToken) -> Context:
    """``token`` and those around it, as ids."""
    middle = "?" if token.token is None else str(token.token)
    return Context(" ".join(map(str, (*token.before, ""))), middle, " ".join(map(str, ("", *token.after))))


def _signed(value: float) -> str:
    return number(value) if value < 0 else f"+{number(value)}"


def about_lines(descriptions: Mapping[str, str], card: Card, width: int) -> list[Line]:
    """What the columns of ``card`` were measured on, in lines of ``width`` cells; none if no column says so.

    Args:
        descriptions: Name of each metric to its ``long_name``. What follows "; " says what it was measured on.
    """
    lines: list[Line] = []
    for item in card.metrics:
        text = one_line(descriptions.get(item.name, ""), 500).partition("; ")[2]
        if text and item.rank:
            lines += [[(f" {line}", "dim")] for line in wrap(f"{item.name}: {text}", max(20, width - 1))]
    return [[], *lines] if lines else []


def _split_lines(card: Card, width: int) -> list[Line]:
    if not card.splits:
        return [[(" this atlas has no sums by split, so it does not tell how stable the channel is", "dim")], []]
    core = sum(split.supernode for split in card.splits)
    cells = min(12, (width - 12) // len(card.splits))
    return [
        [(f" {'split':<10}" + "".join(f"{number_:>{cells}}" for number_ in range(len(card.splits))), "dim")],
        [(f" {'LP':<10}" + "".join(f"{number(split.lp, 2):>{cells}}" for split in card.splits), "")],
        [(f" {'rank':<10}" + "".join(f"{split.rank or '-':>{cells}}" for split in card.splits), "")],
        [(f" a supernode in {core} of {len(card.splits)} splits; LP varies by {percent(card.variation)} of its mean", "")],
        [],
    ]


def _nearest_lines(card: Card) -> list[Line]:
    lines: list[Line] = []
    for rows in (
        (
            ("redundant with ch", [str(other) for other, _, _ in card.partners]),
            ("its rank by LP", [str(rank) for _, _, rank in card.partners]),
            ("nats", [number(value, 2) for _, value, _ in card.partners]),
        ),
        (
            ("writes most to dim", [str(name) for name, _ in card.dimensions]),
            ("share of the write", [percent(share) for _, share in card.dimensions]),
        ),
    ):
        if rows[0][1]:
            lines += [
                [],
                *(
                    [(f" {name:<18}" + "".join(f"{cell:>9}" for cell in cells), "dim" if place == 0 else "")]
                    for place, (name, cells) in enumerate(rows)
                ),
            ]
    return lines


def _support_lines(card: Card, width: int) -> list[Line]:
    if not card.supports:
        return [[(" this atlas has no connectivity by size of the write support", "dim")]]
    cells = 8
    shown = card.supports[: max(1, (width - 20) // cells)]
    return [
        [(f" {'write support':<18}" + "".join(f"{size:>{cells},}" for size, _, _ in shown), "dim")],
        [(f" {'share of the write':<18}" + "".join(f"{percent(share):>{cells}}" for _, share, _ in shown), "")],
        [(f" {'median channel':<18}" + "".join(f"{percent(median):>{cells}}" for _, _, median in shown), "")],
    ]
