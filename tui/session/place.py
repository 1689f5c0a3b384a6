"""A view as data: the options of ``atlas-tui`` that open it again, and the Python code that computes it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from chanfmt.base.errors import UsageError
from tui.session.registry import ROW_OF

if TYPE_CHECKING:
    from tui.session.load import Snapshot

ASCENDING = ":up"
"""Ending of a column's name that sorts the smallest first."""
COLUMNS = ("rank", "channel", "label", "share", "cumulative")
"""Columns of the layer screen besides the metrics."""
QUERY = "query"
"""The screen with the channels of all FFNs."""


@dataclass(frozen=True)
class Place:
    """A view. None and empty text stand for the default.

    Attributes:
        screen: Name of a screen in `tui.session.registry`.
        sort: Column that orders the layer screen or the query, largest first; with `ASCENDING` after it, smallest first.
        filter: Filter of the layer screen, of the query or of the join.
    """

    screen: str = "overview"
    layer: int | None = None
    stack: str | None = None
    expert: int | None = None
    channel: int | None = None
    metric: str = "lp"
    by_index: bool = False
    sort: str = ""
    filter: str = ""

    @property
    def options(self) -> list[str]:
        """Command line options that open this view."""
        values = {
            "screen": "" if self.screen == "overview" else self.screen,
            "layer": self.layer,
            "stack": self.stack,
            "expert": self.expert,
            "channel": self.channel,
            "metric": "" if self.metric == "lp" else self.metric,
            "sort": self.sort,
            "filter": self.filter,
        }
        given = [part for name, value in values.items() if value not in ("", None) for part in (f"--{name}", str(value))]
        return [*given, *(["--by-index"] if self.by_index else [])]

    def find(self, snapshot: Snapshot) -> int:
        """The FFN of ``snapshot`` in this view; the first FFN if the view names none.

        Raises:
            UsageError: The FFN, metric, column or channel does not exist in ``snapshot``, or the layer has several FFNs.
        """
        # The default is LP. The browser shows the metric that ranks the supernodes if the atlas holds no LP.
        if self.metric not in snapshot.metrics and not (self.metric == "lp" and snapshot.score in snapshot.metrics):
            raise UsageError(f"unknown metric {self.metric!r}", hint=f"choose from {', '.join(snapshot.metrics)}")
        places = ("layer", "expert") if self.screen == QUERY else ()
        column, columns = self.sort.removesuffix(ASCENDING), (*COLUMNS, *places, *snapshot.metrics)
        if column and column not in columns:
            raise UsageError(f"unknown column {column!r} after --sort", hint=f"choose from {', '.join(columns)}")
        wanted = {"layer_index": self.layer, "stack": self.stack, "expert": self.expert}
        found = [
            number
            for number, ffn in enumerate(snapshot.ffns)
            if all(value in (None, getattr(ffn, name)) for name, value in wanted.items())
        ]
        if not found:
            named = {
                name: value
                for name, value in (("layer", self.layer), ("stack", self.stack), ("expert", self.expert))
                if value is not None
            }
            layers = sorted({ffn.layer_index for ffn in snapshot.ffns})
            raise UsageError(
                f"unknown {' '.join(f'{name} {value}' for name, value in named.items())}",
                hint=f"layers: {layers[0]} to {layers[-1]}; stacks: {', '.join(snapshot.labels)}",
            )
        stacks = sorted({snapshot.ffns[ffn].stack for ffn in found})
        if self.layer is not None and len(stacks) > 1:
            raise UsageError(f"layer {self.layer} has several FFNs", hint=f"add --stack with one of {', '.join(stacks)}")
        ffn = snapshot.ffns[found[0]]
        if self.channel is not None and not 0 <= self.channel < ffn.n_channels:
            raise UsageError(f"unknown channel {self.channel}", hint=f"channels: 0 to {ffn.n_channels - 1}")
        return found[0]


class Opening(NamedTuple):
    """What a screen is opened with.

    Attributes:
        ffn: The FFN that the cursor starts on or in.
        place: What else the screen starts with: channel, order, filter.
        below: The screen below, for a screen that shows what the screen below has selected.
    """

    ffn: int
    place: Place
    below: Any = None


def command(place: Place, atlas: str, other: str | None = None) -> str:
    """The command line that opens ``place`` again."""
    return shlex.join(["atlas-tui", atlas, *([other] if other else []), *place.options])


def python(place: Place, atlas: str, other: str | None = None, *, marked: list[int]) -> str:
    """Python code that computes what ``place`` shows.

    Args:
        marked: Ids of the marked channels of the FFN, for a filter that uses them. For a query: positions of the marked
            channels of the model.
    """
    row = ROW_OF[place.screen]
    if row.needs_other:
        return "\n".join(
            [
                "import chanfmt",
                "",
                f"rows = chanfmt.compare({atlas!r}, {other!r}, {place.metric!r})",
            ]
        )
    if place.screen == QUERY:
        return _query(place, atlas, marked)
    if row.about == "channels":
        return _layer(place, atlas, marked)
    return "\n".join(
        [
            "import numpy as np",
            "",
            "import chanfmt",
            "",
            f"with chanfmt.open({atlas!r}) as atlas:",
            f"    values = {{block.module: stack.row({place.metric!r}, block.row).ravel()",
            f"              for block, stack in atlas.rows() if {place.metric!r} in stack}}",
            "    rho = atlas.labels.rho",
            "rows = {module: chanfmt.analysis.concentration(row[np.isfinite(row)], rho) for module, row in values.items()}",
        ]
    )


def _layer(place: Place, atlas: str, marked: list[int]) -> str:
    row = "block.row" if place.expert is None else f"block.row, {place.expert}"
    block = f"{place.layer}" if place.stack is None else f"{place.layer}, {place.stack!r}"
    column = place.sort.removesuffix(ASCENDING) or place.metric
    lines = [
        "import numpy as np",
        "",
        "import chanfmt",
        *(["from tui.session.filter import filtered"] if place.filter else []),
        "from tui.session.view import order_by, ranking",
        "",
        f"with chanfmt.open({atlas!r}) as atlas:",
        f"    block = atlas.block({block})",
        "    stack = atlas.stacks[block.stack]",
        f"    columns = {{metric.name: stack[metric.name][{row}] for metric in stack.all_metrics}}",
        f"    labels = stack['label'][{row}]",
        f"ranks = ranking(columns[{place.metric!r}])",
        "columns |= {'rank': ranks.rank, 'share': ranks.share, 'cumulative': ranks.cumulative, 'label': labels}",
        "columns['channel'] = np.arange(len(labels))",
        f"order = order_by(columns[{column!r}], descending={not place.sort.endswith(ASCENDING)})",
    ]
    if place.filter:
        lines += [
            f"marked = np.isin(columns['channel'], {marked})",
            f"keep = filtered({place.filter!r}, columns, labels, {{'marked': marked}})",
            "order = order[keep[order]]",
        ]
    return "\n".join(lines)


def _query(place: Place, atlas: str, marked: list[int]) -> str:
    column = place.sort.removesuffix(ASCENDING) or place.metric
    return "\n".join(
        [
            "import numpy as np",
            "",
            "from tui.session.load import read_snapshot",
            "from tui.session.model import Browser",
            "from tui.session.query import ModelChannels",
            "",
            f"channels = ModelChannels(Browser(read_snapshot({atlas!r}), {place.metric!r}))",
            f"found = channels.find({place.filter!r}, np.isin(np.arange(len(channels)), {marked}))",
            f"order = channels.ordered(found, {column!r}, descending={not place.sort.endswith(ASCENDING)})",
            "rows = [(channels.browser.snapshot.ffns[ffn].layer_index, channel) for ffn, channel in map(channels.at, order)]",
        ]
    )
