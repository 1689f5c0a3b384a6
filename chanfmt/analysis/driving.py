"""The tokens that drive a channel hardest, with the text around them as token ids. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import AtlasError
from chanfmt.format import schema
from chanfmt.format.columns import DRIVING_POSITION, DRIVING_SEQUENCE, DRIVING_VALUE

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block, CalibrationRecord

WINDOW = 8
"""Tokens before and behind a driving token that are its context."""


@dataclass(frozen=True)
class DrivingToken:
    """A token on which |u| of a channel is among the largest.

    Attributes:
        value: The channel's value u.
        sequence, position: Number of the sequence in the calibration, and position in it; None if they are not known.
        token: Id of the token; None if the atlas does not hold it.
        before, after: Ids of the tokens around it in the sequence; empty if the atlas does not hold them.
    """

    value: float
    sequence: int | None = None
    position: int | None = None
    token: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def driving_tokens(
    atlas: Atlas, block: Block, channel: int, expert: int | None = None, *, window: int = WINDOW
) -> tuple[DrivingToken, ...]:
    """The tokens that drive ``channel`` of the FFN ``block`` hardest, the largest |u| first; empty if no token does.

    Args:
        expert: For an FFN of experts, the expert.
        window: Tokens of the context on each side.

    Raises:
        AtlasError: The atlas does not hold them.
    """
    stack = atlas.stacks[block.stack]
    if DRIVING_VALUE not in stack:
        raise AtlasError(f"the atlas has no {DRIVING_VALUE}", hint="build it with --columns drivers")
    place = (channel,) if expert is None else (expert, channel)
    values, sequences, positions = (
        stack.row(name, block.row)[place] for name in (DRIVING_VALUE, DRIVING_SEQUENCE, DRIVING_POSITION)
    )
    return in_context(values, sequences, positions, ids_read(atlas.calibration, block.place), window=window)


def ids_read(calibration: CalibrationRecord, place: str) -> np.ndarray | None:
    """The token ids that the FFNs of ``place`` read, int32 (sequence, position); None if the atlas holds no tokens.

    Where a masked-token loss hides a token, this is the hidden token. The first id that a decoder reads beside an encoder is -1:
    the atlas does not hold it.
    """
    ids = calibration.token_ids
    if ids is None or not (place == "decoder" and calibration.loss == schema.LOSSES["reconstruction"]):
        return ids
    return np.concatenate([np.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)


def in_context(
    values: np.ndarray, sequences: np.ndarray, positions: np.ndarray, ids: np.ndarray | None, *, window: int = WINDOW
) -> tuple[DrivingToken, ...]:
    """Driving tokens of one channel from its arrays (driver,), and from `ids_read`. A place that does not exist is not known."""
    found = []
    for value, sequence, position in zip(values.tolist(), sequences.tolist(), positions.tolist(), strict=True):
        if value != value:
            continue
        # -1 stands for a place that is not known, and a file may name places that do not exist.
        if min(sequence, position) < 0 or (ids is not None and (sequence >= len(ids) or position >= ids.shape[1])):
            found.append(DrivingToken(value))
        elif ids is None:
            found.append(DrivingToken(value, int(sequence), int(position)))
        else:
            row, at = ids[int(sequence)], int(position)
            before, after = row[max(0, at - window) : at], row[at + 1 : at + 1 + window]
            token = int(row[at])
            found.append(
                DrivingToken(
                    value,
                    int(sequence),
                    at,
                    None if token < 0 else token,
                    tuple(item for item in before.tolist() if item >= 0),
                    tuple(item for item in after.tolist() if item >= 0),
                )
            )
    return tuple(found)
