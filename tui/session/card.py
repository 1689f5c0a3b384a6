"""The card of a channel of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.analysis import channel as analysis
from chanfmt.format import schema

if TYPE_CHECKING:
    from tui.session.load import Snapshot


def make_card(snapshot: Snapshot, ffn: int, channel: int) -> analysis.Card:
    """What ``snapshot`` says of ``channel`` of FFN ``ffn``."""
    series = {name: snapshot.series(ffn, name) for name in schema.SERIES}
    return analysis.make_card(
        {name: snapshot.values(ffn, name) for name in snapshot.metrics},
        {name: values for name, values in series.items() if values is not None},
        snapshot.supports[snapshot.ffns[ffn].stack],
        channel,
        snapshot.rho,
    )


def labelled(label: int) -> str:
    """A label in words."""
    return schema.LABELS.get(label, str(label))
