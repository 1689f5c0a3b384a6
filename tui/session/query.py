"""One filter over every channel of the model. Pure numpy, on whole arrays: a model may have millions of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from tui.session import view
from tui.session.filter import filtered

if TYPE_CHECKING:
    from tui.session.model import Browser

MOST_ROWS = 100_000
"""Rows of the table. Sorting more rows would take longer than a person waits for a key."""
PLACES = ("layer", "expert")
"""Columns that tell FFNs apart, besides the columns of one FFN."""


class ModelChannels:
    """Every channel of a model, counted through the FFNs in model order: a channel is known by its position in that count.

    Args:
        browser: The atlas and the metric that ranks the channels of each FFN.

    Attributes:
        columns: Name to values, (position,): what a filter may compare. Each column is computed when it is first asked for.
        labels: Label of every channel, uint8 (position,).
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        snapshot = browser.snapshot
        self._widths = np.array([ffn.n_channels for ffn in snapshot.ffns])
        self._starts = np.concatenate(([0], np.cumsum(self._widths)))
        self.columns: Mapping[str, np.ndarray] = _Columns(self)
        self.labels = np.concatenate([snapshot.span_labels(block) for block in snapshot.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        snapshot = self.browser.snapshot
        places = PLACES if snapshot.has_experts else PLACES[:1]
        return (*places, "rank", "channel", "share", "cumulative", *snapshot.metrics)

    def at(self, position: int) -> tuple[int, int]:
        """The FFN of the channel at ``position``, and its id there."""
        ffn = int(np.searchsorted(self._starts, position, side="right")) - 1
        return ffn, int(position - self._starts[ffn])

    def by_ffn(self, positions: np.ndarray) -> dict[int, np.ndarray]:
        """FFN to the ascending ids of the channels at ``positions``, int64 (n,)."""
        ascending = np.sort(positions)
        ends = np.searchsorted(ascending, self._starts)
        found = np.flatnonzero(np.diff(ends))
        return {int(ffn): ascending[ends[ffn] : ends[ffn + 1]] - self._starts[ffn] for ffn in found}

    def position(self, ffn: int, channel: int) -> int:
        """The position of ``channel`` of FFN ``ffn``."""
        return int(self._starts[ffn]) + channel

    def find(self, text: str, marked: np.ndarray) -> np.ndarray:
        """Positions of the channels that the filter ``text`` chooses, ascending, int64 (n,); all if ``text`` is empty.

        Args:
            marked: Channels with a mark, bool (position,).

        Raises:
            UsageError: ``text`` is not a filter, or chooses no channel.
        """
        if not text:
            return np.arange(len(self))
        try:
            found = np.flatnonzero(filtered(text, self.columns, self.labels, {"marked": marked}))
        except UsageError as error:
            # The line below the table has room for one sentence.
            raise UsageError(f"{error.message}; {error.hint}" if error.hint else error.message) from None
        if not len(found):
            raise UsageError(f"no channel of the model fits {text!r}")
        return found

    def ordered(self, found: np.ndarray, column: str, *, descending: bool) -> np.ndarray:
        """The first `MOST_ROWS` of the positions ``found`` by ``column``, ties in model order, NaN last, int64 (row,)."""
        values = (self.labels if column == "label" else self.columns[column])[found]
        return found[_first(values, MOST_ROWS, descending=descending)]

    def compute(self, name: str) -> dict[str, np.ndarray]:
        """The column ``name``, and the columns that come with it: name to values, (position,)."""
        snapshot = self.browser.snapshot
        if name in PLACES:
            places = [ffn.layer_index if name == "layer" else ffn.expert for ffn in snapshot.ffns]
            # A dense FFN beside FFNs with experts has no number: a comparison does not choose NaN.
            numbers = np.array([np.nan if place is None else place for place in places])
            return {name: np.repeat(numbers if np.isnan(numbers).any() else numbers.astype(np.int32), self._widths)}
        if name == "channel":
            return {name: (np.arange(len(self)) - np.repeat(self._starts[:-1], self._widths)).astype(np.int32)}
        if name in snapshot.metrics:
            stacks = snapshot.stack_values(name)
            rows = ((snapshot.ffns[block[0]].stack, snapshot.ffns[block[0]].row) for block in snapshot.blocks)
            return {name: np.concatenate([stacks[stack][row].ravel() for stack, row in rows])}
        rankings = list(map(view.ranking, np.split(self.columns[self.browser.metric], self._starts[1:-1])))
        return {
            "rank": np.concatenate([ranking.rank.astype(np.int32) for ranking in rankings]),
            "share": np.concatenate([ranking.share for ranking in rankings]),
            "cumulative": np.concatenate([ranking.cumulative for ranking in rankings]),
        }


class _Columns(Mapping[str, np.ndarray]):
    """The columns of ``channels``. They are read and computed late: a filter needs few of them."""

    def __init__(self, channels: ModelChannels) -> None:
        self._channels = channels
        self._kept: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._kept:
            if name not in self._channels.names:
                raise KeyError(name)
            self._kept |= self._channels.compute(name)
        return self._kept[name]

    def __contains__(self, name: object) -> bool:
        return name in self._channels.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels.names)

    def __len__(self) -> int:
        return len(self._channels.names)


def _first(values: np.ndarray, count: int, *, descending: bool) -> np.ndarray:
    """The first ``count`` indices of `tui.session.view.order_by`, without sorting the others."""
    if len(values) <= count:
        return view.order_by(values, descending=descending)
    keys = values.astype(np.float64)
    keys = np.where(np.isnan(keys), np.inf, -keys if descending else keys)
    last = np.partition(keys, count - 1)[count - 1]
    ahead, equal = np.flatnonzero(keys < last), np.flatnonzero(keys == last)
    chosen = np.sort(np.concatenate([ahead, equal[: count - len(ahead)]]))
    return chosen[view.order_by(values[chosen], descending=descending)]
