"""Well-known columns: numbers per channel that several programs make, with one name, type and unit each.

They are extensions (spec section "Extensions") of the owner `OWNER`. ``spec/columns-1.md`` is made from this table. Columns that
are not here belong to their program: ``x_<owner>/<name>``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from chanfmt.format import schema

OWNER = f"{schema.EXTENSION_PREFIX}common"
"""Owner of the well-known columns. It holds no other columns."""
REDUNDANCY_CHANCE = f"{OWNER}/redundancy_chance"
"""The column with the null of chance. A build writes it; a merge and older atlases do not have it."""
ABLATION_LOSS, MEAN_ABLATION_LOSS = f"{OWNER}/ablation_loss", f"{OWNER}/mean_ablation_loss"
ABLATIONS = {ABLATION_LOSS: "set to 0", MEAN_ABLATION_LOSS: "set to its mean"}
"""Columns of a measured loss, to what happened to the channel. The column ``NAME_error`` has the standard errors."""
REPLACEABILITY, REPLACEABILITY_NULL = f"{OWNER}/replaceability", f"{OWNER}/replaceability_null"
NAME = re.compile(r"x_[a-z0-9][a-z0-9_-]{0,30}/[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""The name of a column that a table, an archive and a selector can hold: ``x_owner/name``."""
INDICES = tuple(variable.name for variable in schema.INDEX_VARIABLES)
"""Names that a column may not have, because dimensions have them."""


@dataclass(frozen=True)
class Column:
    """A well-known column.

    Attributes:
        name: ``x_common/<name>``.
        dtype: One of ``f4 f8 i4 i8 u1``.
        units: CF units; ``1`` is dimensionless.
        merge: How two atlases combine it, one of `chanfmt.format.schema.EXTENSION_MERGE_RULES`.
        long_name: What the number is.
        heading: Heading in a table, at most 10 characters; by default the beginning of the name.
    """

    name: str
    dtype: str
    units: str
    merge: str
    long_name: str
    heading: str = ""


def heading_of(name: str) -> str:
    """Heading of the column ``name``, ``x_owner/name``, in a table."""
    known = COLUMN_BY_NAME.get(name)
    return known.heading if known is not None and known.heading else name.rpartition("/")[2][:10]


COLUMNS = (
    Column(f"{OWNER}/active_tokens", "i8", "1", "sum", "tokens on which the channel's value u is above 0"),
    Column(f"{OWNER}/firing_rate", "f4", "1", "drop", "share of tokens on which the channel's value u is above 0"),
    Column(
        REDUNDANCY_CHANCE,
        "f4",
        "nats",
        "drop",
        "redundancy against the same supernodes in other sequences and at other positions: what chance gives",
        "red chance",
    ),
    Column(f"{OWNER}/kurtosis", "f4", "1", "drop", "kurtosis of u over tokens, 3 for a normal distribution"),
    Column(
        ABLATION_LOSS,
        "f4",
        "nats",
        "drop",
        "increase of the mean loss per token if u is set to 0 on all tokens",
        "ablation",
    ),
    Column(
        f"{OWNER}/ablation_loss_error",
        "f4",
        "nats",
        "drop",
        "standard error of ablation_loss over the blocks of the text",
        "abl error",
    ),
    Column(
        MEAN_ABLATION_LOSS,
        "f4",
        "nats",
        "drop",
        "increase of the mean loss per token if u is set to its mean",
        "mean abl",
    ),
    Column(
        f"{OWNER}/mean_ablation_loss_error",
        "f4",
        "nats",
        "drop",
        "standard error of mean_ablation_loss over the blocks of the text",
        "m abl err",
    ),
    Column(
        REPLACEABILITY,
        "f4",
        "1",
        "drop",
        "share of the variance of u on held-out tokens that a linear map from other channels of the FFN explains (R^2)",
        "replace",
    ),
    Column(
        REPLACEABILITY_NULL,
        "f4",
        "1",
        "drop",
        "replaceability if u is taken from other sequences and at other positions: what chance gives",
        "repl null",
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
    Column(
        f"{OWNER}/super_weight", "f4", "1", "max", "largest |u| times the largest |w| of the channel's write vector", "super w"
    ),
    Column(
        f"{OWNER}/super_weight_row",
        "i4",
        "1",
        "equal",
        "residual dimension of the largest |w| of the channel's write vector",
        "w row",
    ),
    Column(f"{OWNER}/peak_token", "i4", "1", "drop", "id of the token on which |u| is largest, or -1", "peak token"),
    Column(f"{OWNER}/peak_position", "i4", "1", "drop", "position of that token in its sequence, or -1", "peak pos"),
    Column(f"{OWNER}/peak_sequence", "i4", "1", "drop", "number of that sequence in /calibration, or -1", "peak seq"),
    Column(f"{OWNER}/first_sum_u2", "f8", "1", "sum", "sum of u^2 over the first positions of sequences", "first u2"),
    Column(f"{OWNER}/first_sum_q2", "f8", "nats2", "sum", "sum of q^2 over the first positions of sequences", "first q2"),
    Column(f"{OWNER}/first_power_share", "f4", "1", "drop", "share of first positions in the sum of u^2", "first pow"),
    Column(f"{OWNER}/first_lp_share", "f4", "1", "drop", "share of first positions in LP", "first LP"),
    Column(f"{OWNER}/delimiter_sum_u2", "f8", "1", "sum", "sum of u^2 over delimiters", "delim u2"),
    Column(f"{OWNER}/delimiter_sum_q2", "f8", "nats2", "sum", "sum of q^2 over delimiters", "delim q2"),
    Column(f"{OWNER}/delimiter_power_share", "f4", "1", "drop", "share of delimiters in the sum of u^2", "delim pow"),
    Column(f"{OWNER}/delimiter_lp_share", "f4", "1", "drop", "share of delimiters in LP", "delim LP"),
    Column(
        f"{OWNER}/source_entropy",
        "f4",
        "nats",
        "drop",
        "entropy of the channel's rate of activity over the calibration sources",
        "src entr",
    ),
)
COLUMN_BY_NAME = {column.name: column for column in COLUMNS}

DRIVER = "driver"
"""Last dimension of `DRIVING_ARRAYS`: the tokens that drive a channel hardest, first the hardest."""
DRIVING_VALUE, DRIVING_SEQUENCE, DRIVING_POSITION = (f"{OWNER}/driving_{name}" for name in ("value", "sequence", "position"))
DRIVING_ARRAYS = (
    Column(DRIVING_VALUE, "f4", "1", "drop", "the channel's values u with the largest |u| over all tokens, the largest first"),
    Column(DRIVING_SEQUENCE, "i4", "1", "drop", "number of the sequence in /calibration where u has this value, or -1"),
    Column(DRIVING_POSITION, "i4", "1", "drop", "position in that sequence, or -1"),
)
"""Well-known arrays with the dimensions of a column and `DRIVER`."""
DRIVERS_KEPT, MOST_DRIVERS = 8, 64
"""Driving tokens of each channel that a build keeps: by default, and at most."""
ARRAY_BY_NAME = {array.name: array for array in DRIVING_ARRAYS}

PEAKS, POSITIONS, ACTIVITY, DRIVERS = "peaks", "positions", "activity", "drivers"
MEASURED_GROUPS = (PEAKS, POSITIONS, ACTIVITY, DRIVERS)
"""The groups of columns that `atlas build` can measure in its pass."""
ALL_GROUPS, NO_GROUPS = "all", "none"


def measured_groups(text: str) -> tuple[str, ...]:
    """The groups that ``--columns`` names, in the order of `MEASURED_GROUPS`. Raises `UsageError`."""
    known = (*MEASURED_GROUPS, ALL_GROUPS, NO_GROUPS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--columns names nothing", hint=f"choose from {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("columns", name, known)
    if len(names) > 1 and NO_GROUPS in names:
        raise UsageError(f"--columns {NO_GROUPS} cannot be combined with other columns", hint=f"leave out {NO_GROUPS}")
    return tuple(group for group in MEASURED_GROUPS if group in names or ALL_GROUPS in names)
