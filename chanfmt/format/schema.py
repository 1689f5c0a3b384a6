"""Every name in an importance atlas, once: variables, attributes, labels, dimensions, units.

The writer, the reader, the validator, merging, the command lines, the terminal browser and ``spec/`` follow from the tables
in this module. It holds only data, so importing it costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORMAT = "channel-importance-atlas"
FORMAT_VERSION = "1.0"
CONVENTIONS = "CF-1.11"
METRIC_DEFINITION = "scar-1"
LOSSES = {
    "next-token": "sum of next-token NLL, nats",
    "masked-token": "sum of the NLL of the 15% of tokens hidden by the mask token, nats",
    "reconstruction": "sum of the NLL of the decoder that gives back the encoder's tokens, nats",
    "embedding": "NLL of a sample of the last hidden state under a unit Gaussian around it, nats",
    "labels": "sum of the NLL of the labels given with the inputs, nats",
}
"""Name of a loss on the command line to the text that an atlas holds."""
NEAREST = 3
"""Number of partners, and of dimensions, that an atlas keeps per channel."""
SPLITS = 8
"""Number of splits the calibration sequences fall into."""
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Words of ``features_required`` that this reader understands; 1.0 defines none."""

LABEL_NONE, LABEL_HALO, LABEL_SUPERNODE = 0, 1, 2
LABELS: dict[int, str] = {LABEL_NONE: "none", LABEL_HALO: "halo", LABEL_SUPERNODE: "supernode"}

MERGE_RULES: dict[str, str] = {
    "sum": "added; a table's rows are joined",
    "max": "the larger",
    "equal": "must agree, otherwise the atlases do not merge",
    "derive": "computed again from the merged sums and labels",
    "weights": "computed again from the model's weights; dropped if the weights are not given",
    "drop": "dropped",
    "index": "a dimension's own values",
}
EXTENSION_MERGE_RULES = ("sum", "max", "equal", "drop")
EXTENSION_PREFIX = "x_"
RESUME_EXTENSION = "x_chanfmt"
"""Extension in which an unfinished build keeps its own state; it holds no metrics."""

STATUSES = ("complete", "partial")
STACK_KINDS = ("dense", "experts", "shared")
PLACES = ("decoder", "encoder", "other")
SOURCES = ("hub", "local", "gguf")
ROLES = ("write", "up", "gate", "write_bias", "up_bias", "gate_bias")


@dataclass(frozen=True)
class Range:
    """The values that a variable may have, both ends included.

    Attributes:
        closed: Whether a value below ``low`` breaks the rule about ranges (E311). Otherwise a negative value breaks the rule
            about signs (E303).
    """

    low: float
    high: float
    closed: bool = False


MAX_REDUNDANCY = 26 * math.log(2)
"""Redundancy of perfectly correlated channels, -1/2 log(2^-52): float64 does not resolve a smaller 1 - r^2."""
ANY = Range(-math.inf, math.inf)
AMOUNT = Range(0, math.inf)
SHARE = Range(0, 1, closed=True)
NATS = Range(0, MAX_REDUNDANCY)
ID = Range(-1, 2**31 - 1, closed=True)
"""An id, or -1 for none."""
LABEL = Range(0, LABEL_SUPERNODE, closed=True)

CORE, SUPPORT, CORRELATIONS = "core", "support", "correlations"
"""What a variable may rest on besides its own FFN: the supernodes that ``core_rho`` chose, the write support of
``support_size`` dimensions, and the correlations that a pass over text measured with the core."""

ALWAYS, WITH_TOKENS, PER_FFN, PARTLY = "always", "with tokens", "per FFN", "partly"
"""Where a variable is not NaN: everywhere; exactly where a token arrived; for all channels of an FFN or for none; only where a
token arrived, but not everywhere there."""


@dataclass(frozen=True)
class Variable:
    """One array of the file, and all that programs need to know to handle it.

    Attributes:
        name: Dataset name.
        dtype: One of ``f4 f8 i4 i8 u1 str``; little-endian, ``str`` is variable-length UTF-8.
        dimensions: Dimension names, slowest first. In a stack of kind ``experts`` an ``expert``
            dimension follows ``layer``.
        long_name: CF ``long_name``: what the number is.
        units: CF ``units``; ``1`` is dimensionless or in the model's own activation units.
        merge: How two atlases combine it, one of `MERGE_RULES`.
        required: Whether a complete atlas must hold it, unless its name is among the root's ``dropped``.
        gated_only: Present only if the FFN has a gate.
        heading: Column heading of at most ten characters.
        range: Values that it may have.
        known: Where it is not NaN: `ALWAYS`, `WITH_TOKENS`, `PER_FFN` or `PARTLY`. Empty stands for `ALWAYS` if atlases add it
            up or agree on it, and for `WITH_TOKENS` otherwise.
        rests_on: What makes it out of date when it changes: some of `CORE`, `SUPPORT`, `CORRELATIONS`.
        ids_of: The dimension whose ids are its values; "residual" for residual dimensions, which an atlas does not count.
        beside: The variable that is known exactly where an id is given.
        kept: Whether unfinished and stripped atlases hold it too.
        counted: Whether the values of an index are 0, 1, 2, ...
    """

    name: str
    dtype: str
    dimensions: tuple[str, ...]
    long_name: str
    units: str
    merge: str
    required: bool = True
    gated_only: bool = False
    heading: str = ""
    range: Range = AMOUNT
    known: str = ""
    rests_on: tuple[str, ...] = ()
    ids_of: str = ""
    beside: str = ""
    kept: bool = False
    counted: bool = True

    @property
    def additive(self) -> bool:
        """Whether a merge cannot do without it: atlases add it up, or take the larger value."""
        return self.merge in ("sum", "max")

    @property
    def stripped(self) -> bool:
        """Whether `chanfmt.algebra.strip` leaves it out."""
        return self.additive and not self.kept

    @property
    def series(self) -> bool:
        """Whether an axis of its own, such as splits, comes before the layer."""
        return "layer" in self.dimensions[1:]

    @property
    def per_channel(self) -> bool:
        """Whether it is one number per channel, a column of a table."""
        return self.dimensions == _CHANNEL

    @property
    def known_where(self) -> str:
        """``known``, with its default filled in."""
        return self.known or (ALWAYS if self.additive or self.merge == "equal" else WITH_TOKENS)


_CHANNEL = ("layer", "channel")

SUMS: tuple[Variable, ...] = (
    Variable("sum_u", "f8", _CHANNEL, "sum over tokens of u", "1", "sum", range=ANY),
    Variable("sum_u2", "f8", _CHANNEL, "sum over tokens of u^2", "1", "sum"),
    Variable("sum_s2", "f8", _CHANNEL, "sum over tokens of s^2, s = dL/du", "nats2", "sum"),
    Variable("sum_q", "f8", _CHANNEL, "sum over tokens of q = u s", "nats", "sum", range=ANY),
    Variable("sum_abs_q", "f8", _CHANNEL, "sum over tokens of |u s|", "nats", "sum"),
    Variable("sum_q2", "f8", _CHANNEL, "sum over tokens of (u s)^2", "nats2", "sum"),
)

METRICS: tuple[Variable, ...] = (
    Variable("lp", "f4", _CHANNEL, "loss proxy, 1/2 E[(u s)^2]", "nats2", "derive", heading="LP"),
    Variable(
        "lp_factored",
        "f4",
        _CHANNEL,
        "factored loss proxy, 1/2 E[u^2] E[s^2]",
        "nats2",
        "derive",
        heading="LP fact",
    ),
    Variable(
        "activation_power",
        "f4",
        _CHANNEL,
        "activation power, E[u^2]",
        "1",
        "derive",
        heading="act pow",
    ),
    Variable("curvature", "f4", _CHANNEL, "curvature, E[s^2]", "nats2", "derive", heading="curv"),
    Variable("taylor", "f4", _CHANNEL, "first-order importance, E[|u s|]", "nats", "derive", heading="taylor"),
    Variable(
        "write_norm",
        "f4",
        _CHANNEL,
        "L2 norm of the write vector",
        "1",
        "equal",
        heading="w write",
    ),
    Variable(
        "gate_norm",
        "f4",
        _CHANNEL,
        "L2 norm of the gate row",
        "1",
        "equal",
        gated_only=True,
        heading="w gate",
    ),
    Variable("up_norm", "f4", _CHANNEL, "L2 norm of the up row", "1", "equal", heading="w up"),
    Variable(
        "connectivity",
        "f4",
        _CHANNEL,
        "share of the write vector's L1 norm on the layer's write support",
        "1",
        "weights",
        heading="conn",
        range=SHARE,
        rests_on=(CORE, SUPPORT),
    ),
    Variable(
        "redundancy",
        "f4",
        _CHANNEL,
        "mean of the largest -1/2 log(1 - max(r,0)^2) to supernodes, r = Pearson correlation of q",
        "nats",
        "drop",
        required=False,
        heading="redund",
        range=NATS,
        known=PARTLY,
        rests_on=(CORE, CORRELATIONS),
    ),
    Variable(
        "redundancy_null",
        "f4",
        _CHANNEL,
        "redundancy against the same supernodes shifted by one sequence",
        "nats",
        "drop",
        required=False,
        heading="red null",
        range=NATS,
        known=PARTLY,
        rests_on=(CORE, CORRELATIONS),
    ),
    Variable(
        "protection",
        "f4",
        _CHANNEL,
        "protection factor of the halo, 1 outside it",
        "1",
        "derive",
        heading="protect",
        range=SHARE,
        known=ALWAYS,
    ),
    Variable(
        "read_connectivity",
        "f4",
        _CHANNEL,
        "share of the read rows' L1 norm on the previous layer's write support",
        "1",
        "weights",
        heading="read conn",
        range=SHARE,
        known=PER_FFN,
        rests_on=(CORE, SUPPORT),
    ),
)

STACK_VARIABLES: tuple[Variable, ...] = (
    Variable("tokens", "i8", ("layer",), "tokens that reached the FFN", "1", "sum", kept=True),
    Variable("tokens_split", "i8", ("split", "layer"), "tokens that reached the FFN, per split", "1", "sum", kept=True),
    *SUMS,
    Variable("sum_q2_split", "f8", ("split", "layer", "channel"), "sum over tokens of (u s)^2, per split", "nats2", "sum"),
    Variable("max_abs_u", "f4", _CHANNEL, "largest |u|", "1", "max"),
    Variable("write_norm_l1", "f4", _CHANNEL, "L1 norm of the write vector", "1", "equal"),
    *METRICS,
    Variable(
        "connectivity_at",
        "f4",
        ("support", "layer", "channel"),
        "connectivity to write supports of other sizes",
        "1",
        "weights",
        required=False,
        range=SHARE,
        rests_on=(CORE,),
    ),
    Variable(
        "redundancy_partner",
        "i4",
        ("nearest", "layer", "channel"),
        "supernode of the largest pair redundancy with the channel, the next, ...; -1 where there are no more",
        "1",
        "drop",
        required=False,
        range=ID,
        rests_on=(CORE, CORRELATIONS),
        ids_of="channel",
        beside="redundancy_pair",
    ),
    Variable(
        "redundancy_pair",
        "f4",
        ("nearest", "layer", "channel"),
        "pair redundancy with that supernode",
        "nats",
        "drop",
        required=False,
        range=NATS,
        known=PARTLY,
        rests_on=(CORE, CORRELATIONS),
    ),
    Variable(
        "write_dimension",
        "i4",
        ("nearest", "layer", "channel"),
        "dimension of the write support that the channel writes to most, the next, ...; -1 where there are no more",
        "1",
        "drop",
        required=False,
        range=ID,
        rests_on=(CORE, SUPPORT),
        ids_of="residual",
        beside="write_share",
    ),
    Variable(
        "write_share",
        "f4",
        ("nearest", "layer", "channel"),
        "share of the write vector's L1 norm on that dimension",
        "1",
        "drop",
        required=False,
        range=SHARE,
        known=PARTLY,
        rests_on=(CORE, SUPPORT),
    ),
    Variable(
        "wanda_group",
        "f4",
        _CHANNEL,
        "sum over gate, up and write weights of |W| times the RMS of that weight's input",
        "1",
        "drop",
        required=False,
    ),
    Variable("label", "u1", _CHANNEL, "0 none, 1 halo, 2 supernode", "1", "derive", range=LABEL),
    Variable(
        "redundancy_tokens",
        "i8",
        ("layer",),
        "tokens behind the redundancy correlations",
        "1",
        "drop",
        required=False,
        rests_on=(CORRELATIONS,),
    ),
    Variable(
        "core_covered",
        "f4",
        ("layer",),
        "share of the supernodes that were in the candidate core when correlations were accumulated",
        "1",
        "drop",
        required=False,
        range=SHARE,
        rests_on=(CORRELATIONS,),
    ),
)

INDEX_VARIABLES: tuple[Variable, ...] = (
    Variable("layer", "i4", ("layer",), "layer index in the model", "1", "index", counted=False),
    Variable("channel", "i4", ("channel",), "channel index in the FFN", "1", "index"),
    Variable("expert", "i4", ("expert",), "expert index in the FFN", "1", "index", required=False),
    Variable("split", "i4", ("split",), "calibration split", "1", "index"),
    Variable("nearest", "i4", ("nearest",), "place in the order, 0 is first", "1", "index", required=False),
    Variable(
        "support", "i4", ("support",), "residual dimensions in the write support", "1", "index", required=False, counted=False
    ),
)

CALIBRATION_VARIABLES: tuple[Variable, ...] = (
    Variable("sequence", "i4", ("sequence",), "sequence index", "1", "index"),
    Variable("position", "i4", ("position",), "token position in the sequence", "1", "index", required=False),
    Variable("token_ids", "i4", ("sequence", "position"), "token ids of every calibration sequence", "1", "sum", required=False),
    Variable("sequence_sha256", "str", ("sequence",), "SHA-256 of the sequence's little-endian int32 token ids", "", "sum"),
    Variable("source_of", "i4", ("sequence",), "row of the contribution table the sequence came from", "1", "sum"),
    Variable("split_of", "u1", ("sequence",), "split the sequence was counted in", "1", "sum"),
    Variable("contribution", "i4", ("contribution",), "contribution index", "1", "index"),
    Variable("contribution_id", "str", ("contribution",), "unique id of the contribution", "", "sum"),
    Variable("contribution_source", "str", ("contribution",), "calibration source", "", "sum"),
    Variable("contribution_revision", "str", ("contribution",), "revision of the source, or SHA-256 of its text", "", "sum"),
    Variable("contribution_range", "str", ("contribution",), "blocks of the packed source that were drawn from", "", "sum"),
    Variable("contribution_sequences", "i8", ("contribution",), "sequences contributed", "1", "sum"),
    Variable("contribution_tokens", "i8", ("contribution",), "tokens contributed", "1", "sum"),
    Variable("contribution_producer", "str", ("contribution",), "program that measured them", "", "sum"),
    Variable(
        "contribution_inputs",
        "str",
        ("contribution",),
        "of a file of inputs its arrays, JSON object of name to type and shape of a sample",
        "",
        "sum",
        required=False,
    ),
)

BLOCK_VARIABLES: tuple[Variable, ...] = (
    Variable("block", "i4", ("block",), "FFN index, in model order", "1", "index"),
    Variable("layer_index", "i4", ("block",), "layer index in the model", "1", "equal"),
    Variable("place", "str", ("block",), "decoder, encoder or other", "", "equal"),
    Variable("module", "str", ("block",), "module that holds the write projection", "", "equal"),
    Variable("stack", "str", ("block",), "stack that holds the block's arrays", "", "equal"),
    Variable("row", "i4", ("block",), "row of the stack's layer dimension", "1", "equal"),
    Variable("n_channels", "i4", ("block",), "channels of the FFN", "1", "equal"),
    Variable("n_experts", "i4", ("block",), "experts of the FFN, 0 where it is dense", "1", "equal"),
    Variable("tensors", "str", ("block",), "checkpoint tensors and their slices, JSON", "", "equal"),
    Variable(
        "width_field",
        "str",
        ("block",),
        "config field that sets the FFN's width, dotted, with a list's position in brackets; empty if none sets it alone",
        "",
        "equal",
        required=False,
    ),
    Variable(
        "width_factor",
        "i4",
        ("block",),
        "channels for each unit of the integer that all FFNs with that field share, 0 if there is no field",
        "1",
        "equal",
        required=False,
    ),
    Variable(
        "channel_parameters",
        "i8",
        ("block",),
        "parameters of one channel in the checkpoint; with experts, of one channel of one expert",
        "1",
        "equal",
        required=False,
    ),
)

PRODUCER_VARIABLES: tuple[Variable, ...] = (
    Variable("byte", "i4", ("byte",), "byte index", "1", "index", required=False),
    Variable("file_sha256", "u1", ("byte",), "SHA-256 of the file with these 32 bytes set to zero", "1", "drop", required=False),
)


@dataclass(frozen=True)
class Attribute:
    """One attribute of a group: ``type`` is ``str``, ``int`` or ``float``.

    Attributes:
        required: Whether the group must have it.
    """

    name: str
    type: str
    meaning: str
    required: bool = True


ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {
    "/": (
        Attribute("format", "str", f'the constant "{FORMAT}"'),
        Attribute("format_version", "str", "MAJOR.MINOR of this specification"),
        Attribute("features_required", "str", "space-separated words a reader must understand; empty in 1.0"),
        Attribute("status", "str", "complete or partial"),
        Attribute("dropped", "str", "space-separated variables that are left out because they could not be merged or recomputed"),
        Attribute("Conventions", "str", "CF conventions followed"),
        Attribute("title", "str", "one line for people"),
        Attribute("producer", "str", "program and version"),
        Attribute("created", "str", "ISO 8601, UTC"),
        Attribute("content_sha256", "str", "digest over data, attributes and dimensions"),
    ),
    "/model": (
        Attribute("id", "str", "name of the repository on the Hub, or of the directory or file; never a path to open"),
        Attribute("revision", "str", "commit that the weights came from; empty if there is none"),
        Attribute("source", "str", "hub, local or gguf"),
        Attribute("model_type", "str", "transformers model type"),
        Attribute("architectures", "str", "JSON list of class names"),
        Attribute("config", "str", "the model's config.json"),
        Attribute("config_sha256", "str", "SHA-256 of config"),
        Attribute("dtype", "str", "dtype the model was run in"),
        Attribute("parameters", "int", "number of parameters"),
        Attribute("fingerprint", "str", "SHA-256 over tensor names, shapes, dtypes and a sample of the bytes"),
    ),
    "/calibration": (
        Attribute("loss", "str", "the loss differentiated"),
        Attribute("metric_definition", "str", "version of the metric definitions"),
        Attribute("tokenizer", "str", "tokenizer that was used; empty if the model's inputs were not tokens"),
        Attribute("seq_len", "int", "tokens in every sequence, or rows that every sample gives to an FFN"),
        Attribute("seed", "int", "seed of the sample; with several contributions, the seed of the first"),
        Attribute("mean_loss", "float", "mean of the loss over the predicted calibration tokens, nats"),
        Attribute(
            "special_tokens",
            "str",
            "JSON object: before and after, the lists of token ids that every sequence begins and ends with; absent in older "
            "files and if the model's inputs were not tokens",
            required=False,
        ),
        Attribute(
            "tokenizer_special_tokens",
            "str",
            "the same for what the tokenizer puts around a text; present if and only if special_tokens is",
            required=False,
        ),
    ),
    "/labels": (
        Attribute("rho", "float", "share of channels that are supernodes"),
        Attribute("eta", "float", "share of the other channels that are halo"),
        Attribute("support_size", "int", "dimensions in the write support"),
        Attribute("alpha", "float", "floor of the protection factor"),
        Attribute("gamma", "float", "exponent of the protection factor"),
        Attribute("redundancy_top_k", "int", "supernodes averaged in redundancy"),
        Attribute("core_rho", "float", "share of channels in the core that connectivity and redundancy refer to"),
        Attribute("score", "str", "metric that ranks supernodes"),
        Attribute("ties", "str", "how ties are broken"),
    ),
    "/producer": (
        Attribute("versions", "str", "JSON object: package to version"),
        Attribute("command", "str", "command line that built the file"),
        Attribute("hardware", "str", "device the model ran on"),
        Attribute("seconds", "float", "seconds of measurement"),
        Attribute("peak_memory_bytes", "int", "peak resident memory of the producing process"),
        Attribute("history", "str", "one line with a JSON object per command that touched the file"),
    ),
    "/stacks/*": (
        Attribute("kind", "str", "dense, experts or shared"),
        Attribute("gated", "int", "1 if the FFNs have a gate projection, otherwise 0"),
        Attribute("activation", "str", "activation function that the model's config names"),
    ),
}

METRIC_BY_NAME: dict[str, Variable] = {metric.name: metric for metric in METRICS}
STACK_VARIABLE_BY_NAME: dict[str, Variable] = {variable.name: variable for variable in STACK_VARIABLES}
SERIES: tuple[str, ...] = tuple(variable.name for variable in STACK_VARIABLES if variable.series)
"""Stack variables with an axis of their own before the layer."""
STRIPPED: tuple[str, ...] = tuple(variable.name for variable in STACK_VARIABLES if variable.stripped)
"""Stack variables that an atlas for sharing leaves out."""


def resting_on(what: str) -> tuple[str, ...]:
    """Names of the stack variables that rest on ``what``, one of `CORE`, `SUPPORT`, `CORRELATIONS`."""
    return tuple(variable.name for variable in STACK_VARIABLES if what in variable.rests_on)


def stack_dimensions(variable: Variable, kind: str) -> tuple[str, ...]:
    """Dimensions of ``variable`` in a stack of ``kind`` (spec section "Stacks")."""
    if kind != "experts" or "layer" not in variable.dimensions or variable in INDEX_VARIABLES:
        return variable.dimensions
    position = variable.dimensions.index("layer") + 1
    return (*variable.dimensions[:position], "expert", *variable.dimensions[position:])
