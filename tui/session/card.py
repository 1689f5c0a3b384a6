"""The card of one channel of a snapshot. Pure numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.analysis import channel as analysis
from chanfmt.format import schema

if TYPE_CHECKING:
    from tui.session.load import Snapshot


def make_card(snapshot: Snapshot, ffn: int, channel: int) -> analysis.Card:
    """Everything that ``snapshot`` knows about ``channel`` of FFN ``ffn``."""
    series = {name: snapshot.series(ffn, name) for name in schema.SERIES}
    return analysis.make_card(
        {name: snapshot.values(ffn, name) for name in snapshot.metrics},
        {name: values for name, values in series.items() if values is not None},
        snapshot.supports[snapshot.ffns[ffn].stack],
        channel,
        snapshot.rho,
    )


def labelled(label: int) -> str:
    """The name of a label."""
    return schema.LABELS.get(label, str(label))
