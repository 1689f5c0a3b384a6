"""Well-known columns: numbers per channel that several programs make, with one name, type and unit each. Data only.

They are extensions (spec section "Extensions") of the owner `OWNER`. ``spec/columns-1.md`` is made from this table. Columns that
are not here belong to their program: ``x_<owner>/<name>``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chanfmt.format import schema

OWNER = f"{schema.EXTENSION_PREFIX}common"
"""Owner of the well-known columns. It holds no other columns."""
NAME = re.compile(r"x_[a-z0-9][a-z0-9_-]{0,30}/[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""The name of a column that a table, an archive and a selector can hold: ``x_owner/name``."""
INDICES = tuple(variable.name for variable in schema.INDEX_VARIABLES)
"""Names that a column may not have, because dimensions have them."""


@dataclass(frozen=True)
class Column:
    """A well-known column.

    Attributes:
        name: ``x_common/<name>``.
        dtype: One of ``f4 i4 i8 u1``.
        units: CF units; ``1`` is dimensionless.
        merge: How two atlases combine it, one of `chanfmt.format.schema.EXTENSION_MERGE_RULES`.
        long_name: What the number is.
    """

    name: str
    dtype: str
    units: str
    merge: str
    long_name: str


COLUMNS = (
    Column(f"{OWNER}/active_tokens", "i8", "1", "sum", "tokens on which the channel's value u is above 0"),
    Column(f"{OWNER}/firing_rate", "f4", "1", "drop", "share of tokens on which the channel's value u is above 0"),
    Column(
        f"{OWNER}/redundancy_chance",
        "f4",
        "nats",
        "drop",
        "redundancy against the same supernodes in other sequences and at other positions: what chance gives",
    ),
    Column(f"{OWNER}/kurtosis", "f4", "1", "drop", "kurtosis of u over tokens, 3 for a normal distribution"),
    Column(f"{OWNER}/ablation_loss", "f4", "nats", "drop", "increase of the mean loss per token if u is set to 0 on all tokens"),
    Column(f"{OWNER}/ablation_loss_error", "f4", "nats", "drop", "standard error of ablation_loss over the blocks of the text"),
    Column(f"{OWNER}/mean_ablation_loss", "f4", "nats", "drop", "increase of the mean loss per token if u is set to its mean"),
    Column(
        f"{OWNER}/mean_ablation_loss_error",
        "f4",
        "nats",
        "drop",
        "standard error of mean_ablation_loss over the blocks of the text",
    ),
    Column(
        f"{OWNER}/replaceability",
        "f4",
        "1",
        "drop",
        "share of the variance of u on held-out tokens that a linear map from other channels of the FFN explains (R^2)",
    ),
    Column(
        f"{OWNER}/replaceability_null",
        "f4",
        "1",
        "drop",
        "replaceability if u is taken from other sequences and at other positions: what chance gives",
    ),
    Column(f"{OWNER}/hessian_diagonal", "f4", "nats", "drop", "mean over tokens of the second derivative of the loss by u"),
    Column(f"{OWNER}/integrated_gradients", "f4", "nats", "drop", "mean over tokens of the integrated gradients of u from 0"),
    Column(f"{OWNER}/sae_feature", "i4", "1", "equal", "feature of a sparse autoencoder that is most like the channel, or -1"),
    Column(
        f"{OWNER}/sae_similarity", "f4", "1", "equal", "cosine of that feature's decoder vector with the channel's write vector"
    ),
    Column(f"{OWNER}/cluster", "i4", "1", "equal", "group that the channel belongs to, counted from 0, or -1"),
    Column(f"{OWNER}/explanation_score", "f4", "1", "equal", "correlation of u with its prediction from an explanation in words"),
    Column(f"{OWNER}/kept", "u1", "1", "equal", "1 if a published cut of the model keeps the channel, otherwise 0"),
)
HEADINGS = {
    f"{OWNER}/{name}": heading
    for name, heading in {
        "redundancy_chance": "red chance",
        "ablation_loss": "ablation",
        "ablation_loss_error": "abl error",
        "mean_ablation_loss": "mean abl",
        "mean_ablation_loss_error": "m abl err",
        "replaceability": "replace",
        "replaceability_null": "repl null",
    }.items()
}
"""Headings of tables for columns whose names do not differ in their first ten characters, or say little there."""
COLUMN_BY_NAME = {column.name: column for column in COLUMNS}
