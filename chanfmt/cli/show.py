"""`atlas show`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line, percentage, significant
from chanfmt.cli import framework
from chanfmt.cli.framework.options import TOKENIZER_MODEL
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    import numpy as np

    from chanfmt.analysis.channel import Card
    from chanfmt.analysis.driving import DrivingToken
    from chanfmt.analysis.token_texts import Context
    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block


EXAMPLES = (
    "atlas show llama.h5 --layer 3 --sort activation_power --top 50",
    "atlas show mixtral.h5 --layer 3 --expert 5 --channel 1234 --json",
    "atlas show llama.h5 --super-weights --top 10",
)


_FIRST = (
    "lp", "activation_power", "taylor", "connectivity", "redundancy", "protection", "curvature", "lp_factored", "write_norm",
    "redundancy_null", "gate_norm", "up_norm", "read_connectivity",
)  # fmt: skip
"""Metrics in the order in which a narrow terminal keeps them."""


@dataclass(frozen=True)
class ShowOptions:
    """Which channels, and in which order."""

    layer: int | None = field(default=None, metadata={"help": "layer number in the model", "metavar": "L", "main": True})
    super_weights: bool = field(
        default=False,
        metadata={
            "help": "list the model's super-weight candidates instead: the largest |u| times the largest |w| of a channel (needs an "
            "atlas with --columns peaks)"
        },
    )
    stack: str | None = field(
        default=None, metadata={"help": "stack of the FFN, if the layer has FFNs in several stacks", "metavar": "NAME"}
    )
    expert: int | None = field(default=None, metadata={"help": "expert, if the layer has experts", "metavar": "E"})
    channel: int | None = field(
        default=None,
        metadata={"help": "this channel alone: its ranks, splits, partners, dimensions, and driving tokens", "metavar": "C"},
    )
    model: str | None = field(default=None, metadata=TOKENIZER_MODEL)
    sort: str | None = field(
        default=None,
        metadata={
            "help": "metric to sort by, largest first; or channel, for the order of ids (default: lp, or the metric that ranks "
            "the supernodes)",
            "metavar": "METRIC",
        },
    )
    top: int = field(default=20, metadata={"help": "rows to print, 0 for all", "metavar": "N"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "show",
        "list a layer's channels or experts, all numbers of one channel, or super-weight candidates",
        run=_run,
        options=lambda: (AtlasOptions, ShowOptions),
        examples=EXAMPLES,
        description=(
            "List the channels of a layer's FFN. If the layer has experts, list the experts, or with --expert the channels of one "
            "expert. With --channel, print all that the atlas holds about one channel. With --super-weights, list the channels of the "
            "whole model in which a single weight meets the largest activations."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.hub.locate import open_atlas

    if arguments.top < 0:
        raise UsageError(f"--top must be 0 or more, not {arguments.top}")
    if arguments.super_weights:
        for name in ("layer", "stack", "expert", "channel", "sort"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--super-weights lists the whole model, and --{name} does not", hint="leave out one of them")
        with open_atlas(arguments.file, contained=True) as atlas:
            _show_super_weights(atlas, arguments)
        return 0
    if arguments.layer is None:
        raise UsageError("show needs a layer", hint="add --layer L, or --super-weights")
    with open_atlas(arguments.file, contained=True) as atlas:
        block = atlas.block(arguments.layer, arguments.stack)
        stack = atlas.stacks[block.stack]
        expert = arguments.expert
        if expert is not None and not 0 <= expert < block.n_experts:
            raise UsageError(
                f"layer {block.layer_index} has no expert {expert}",
                hint=(
                    f"experts: 0 to {block.n_experts - 1}" if block.n_experts else "the layer has no experts: leave out --expert"
                ),
            )
        if block.n_experts and expert is None:
            if arguments.channel is not None:
                raise UsageError(f"layer {block.layer_index} has {block.n_experts} experts", hint="add --expert E")
            _show_experts(atlas, stack, block, arguments)
            return 0
        if arguments.channel is not None:
            _show_channel(atlas, stack, block, arguments)
        else:
            _show_channels(atlas, stack, block, arguments)
    return 0


def _show_super_weights(atlas: Atlas, arguments: argparse.Namespace) -> None:
    import dataclasses

    from chanfmt.analysis.candidates import super_weights

    found = super_weights(atlas, arguments.top)
    if arguments.json:
        framework.print_json({"super_weights": [dataclasses.asdict(item) for item in found]})
        return
    several = len({item.stack for item in found}) > 1
    experts = any(item.expert is not None for item in found)
    framework.print_table(
        [
            *(["stack"] if several else []),
            "layer",
            *(["expert"] if experts else []),
            *("channel", "row", "|u| x |w|", "max |u|", "token", "position", "sequence"),
        ],
        [
            [
                *([item.stack] if several else []),
                str(item.layer),
                *([_whole(item.expert)] if experts else []),
                *(str(item.channel), _whole(item.row), significant(item.value)),
                "-" if item.peak is None else significant(item.peak),
                *(_whole(number) for number in (item.token, item.position, item.sequence)),
            ]
            for item in found
        ],
    )


def _whole(number: int | None) -> str:
    return "-" if number is None else str(number)


def _cell(value: float, dtype: str) -> str:
    """``value`` of a metric of type ``dtype``. Ids and counts are printed whole, because people type them back."""
    return str(int(value)) if dtype[0] in "iu" and value == value else significant(value)


def _values(stack: Stack, block: Block, expert: int | None, name: str) -> np.ndarray:
    row = stack.row(name, block.row)
    return row if expert is None else row[expert]


def _place(block: Block, expert: int | None) -> dict[str, Any]:
    return {
        "layer": block.layer_index,
        "stack": block.stack,
        "module": block.module,
        **({} if expert is None else {"expert": expert}),
    }


def _ranked_by(atlas: Atlas, stack: Stack) -> str:
    """LP, or the metric that ranks the supernodes if the stack holds no LP."""
    return atlas.labels.score if "lp" not in stack and atlas.labels.score in stack else "lp"


def _show_channels(atlas: Atlas, stack: Stack, block: Block, arguments: argparse.Namespace) -> None:
    import numpy as np

    from chanfmt.format import schema

    sort = arguments.sort or _ranked_by(atlas, stack)

    held = {metric.name: metric.heading for metric in stack.all_metrics}
    types = {metric.name: metric.dtype for metric in stack.all_metrics}
    values = {name: _values(stack, block, arguments.expert, name) for name in held}
    names = [name for name in held if not np.isnan(values[name]).all()]
    if sort not in ("channel", *names):
        raise UsageError(f"layer {block.layer_index} has no {sort}", hint=f"metrics: {', '.join(names)}")
    label = _values(stack, block, arguments.expert, "label")
    order = np.arange(stack.n_channels)
    if sort != "channel":
        # NaN means unknown, not large, so it sorts last.
        order = np.argsort(-np.nan_to_num(values[sort], nan=-np.inf), kind="stable")
    order = order[: arguments.top or None]
    if arguments.json:
        framework.print_json(
            {
                **_place(block, arguments.expert),
                "channels": [
                    {
                        "channel": int(channel),
                        "label": schema.LABELS.get(int(label[channel]), "?"),
                        **{name: float(values[name][channel]) for name in names},
                    }
                    for channel in order
                ],
            }
        )
        return
    # The metrics that say most about a channel stay longest.
    spare = sorted(names, key=lambda name: -_FIRST.index(name) if name in _FIRST else -len(_FIRST))
    framework.print_table(
        ["rank", "channel", "label", *(held[name] for name in names)],
        [
            [
                str(rank),
                str(channel),
                schema.LABELS.get(int(label[channel]), "?"),
                *(_cell(float(values[name][channel]), types[name]) for name in names),
            ]
            for rank, channel in enumerate(order, 1)
        ],
        [3 + names.index(name) for name in spare if name != sort],
    )


def _show_experts(atlas: Atlas, stack: Stack, block: Block, arguments: argparse.Namespace) -> None:
    import dataclasses

    from chanfmt.analysis.mass import concentration
    from chanfmt.format import schema

    score, rho = _ranked_by(atlas, stack), atlas.labels.rho
    if score not in stack:
        raise AtlasError(f"layer {block.layer_index} has no {score}", hint="see: atlas info")
    rows = []
    for expert in range(block.n_experts):
        label = _values(stack, block, expert, "label")
        rows.append(
            {
                "expert": expert,
                "tokens": int(stack.row("tokens", block.row)[expert]),
                **dataclasses.asdict(concentration(_values(stack, block, expert, score), rho)),
                "supernodes": int((label == schema.LABEL_SUPERNODE).sum()),
                "halo": int((label == schema.LABEL_HALO).sum()),
            }
        )
    if arguments.sort not in (None, score):
        raise UsageError("--sort does not sort experts", hint="add --expert E to sort the channels of an expert")
    shown = rows[: arguments.top or None]
    if arguments.json:
        framework.print_json({**_place(block, None), "experts": shown})
        return
    framework.print_table(
        [
            "expert",
            "tokens",
            f"{schema.METRIC_BY_NAME[score].heading} mass",
            f"top {100 * rho:g}%",
            "n_eff",
            "max/mean",
            "super",
            "halo",
        ],
        [
            [
                str(row["expert"]),
                f"{row['tokens']:,}",
                significant(row["mass"], 3),
                percentage(row["top_share"]),
                *(significant(row[name]) for name in ("effective_channels", "max_over_mean")),
                str(row["supernodes"]),
                str(row["halo"]),
            ]
            for row in shown
        ],
    )


def _show_channel(atlas: Atlas, stack: Stack, block: Block, arguments: argparse.Namespace) -> None:
    import dataclasses

    from chanfmt.analysis.channel import make_card
    from chanfmt.analysis.driving import driving_tokens
    from chanfmt.format import schema
    from chanfmt.format.columns import DRIVING_VALUE

    channel, expert = arguments.channel, arguments.expert
    if not 0 <= channel < block.n_channels:
        raise UsageError(f"layer {block.layer_index} has no channel {channel}", hint=f"channels: 0 to {block.n_channels - 1}")
    names = [metric.name for metric in stack.all_metrics]
    if _ranked_by(atlas, stack) not in names:
        raise AtlasError(f"layer {block.layer_index} has no {_ranked_by(atlas, stack)}", hint="see: atlas info")
    series = {}
    for name in schema.SERIES:
        if name in stack:
            rows = stack[name][:, block.row]
            series[name] = rows if expert is None else rows[:, expert]
    card = make_card(
        {name: _values(stack, block, expert, name) for name in names}, series, stack.supports, channel, atlas.labels.rho
    )
    label = schema.LABELS.get(int(_values(stack, block, expert, "label")[channel]), "?") if "label" in stack else "unknown"
    # A column of a measurement says behind "; " what it was measured on.
    known = {item.name for item in card.metrics if item.rank}
    about = {
        metric.name: one_line(metric.long_name, 500).partition("; ")[2]
        for metric in stack.extension_metrics
        if metric.name in known
    }
    about = {name: text for name, text in about.items() if text}
    tokens = driving_tokens(atlas, block, channel, expert) if DRIVING_VALUE in stack else ()
    contexts = _contexts(atlas, tokens, arguments.model)
    if arguments.json:
        measured = {"measured_on": about} if about else {}
        driving = {
            "driving_tokens": [
                dataclasses.asdict(token) | ({} if context is None else {"text": context._asdict()})
                for token, context in zip(tokens, contexts, strict=True)
            ]
        }
        framework.print_json(
            {
                **_place(block, expert),
                "channel": channel,
                "label": label,
                **dataclasses.asdict(card),
                **measured,
                **(driving if DRIVING_VALUE in stack else {}),
            }
        )
        return
    of = "" if expert is None else f" expert {expert}"
    framework.print_line(f"layer {block.layer_index}{of} channel {channel}: {label}")
    framework.print_line()
    _print_card(card, {metric.name: metric.dtype for metric in stack.all_metrics})
    if tokens:
        framework.print_line()
        framework.print_line("tokens that drive the channel hardest")
        framework.print_table(
            ["u", "sequence", "position", "token", "context" if any(contexts) else "ids around it"],
            [
                (
                    significant(token.value),
                    *(_whole(number) for number in (token.sequence, token.position, token.token)),
                    _around(token) if context is None else f"{context.before[-30:]}»{context.token}«{context.after[:20]}",
                )
                for token, context in zip(tokens, contexts, strict=True)
            ],
        )
    if about:
        framework.print_line()
    for name, text in about.items():
        framework.print_line(f"{name}: {text}")


def _contexts(atlas: Atlas, tokens: Sequence[DrivingToken], model: str | None) -> list[Context | None]:
    """The text of each of ``tokens``; None if it is not known or there is no tokenizer on this machine."""
    from chanfmt.analysis.token_texts import TokenTexts
    from chanfmt.hub.locate import locate_tokenizer

    path = locate_tokenizer(atlas.model, model) if tokens or model is not None else None
    if path is None:
        if model is not None:
            say(f"note: {model} has no tokenizer.json on this machine, so tokens are printed as ids")
        return [None] * len(tokens)
    texts = TokenTexts.read(path)
    return [texts.context(token) for token in tokens]


def _around(token: DrivingToken) -> str:
    """The ids of the tokens next to ``token``."""
    if token.token is None:
        return "-"
    return " ".join([*map(str, token.before[-3:]), f"»{token.token}«", *map(str, token.after[:3])])


def _print_card(card: Card, types: Mapping[str, str]) -> None:
    def share(value: float) -> str:
        return "-" if value != value else f"{value:.1%}"

    framework.print_table(
        ["metric", "value", "rank", "of", "above", "x median"],
        [
            (
                item.name,
                _cell(item.value, types[item.name]),
                str(item.rank or "-"),
                str(item.known),
                share(item.below),
                significant(item.times_median, 3),
            )
            for item in card.metrics
        ],
    )
    if card.splits:
        core = sum(split.supernode for split in card.splits)
        framework.print_line()
        framework.print_line(
            f"a supernode in {core} of {len(card.splits)} splits; LP varies by {share(card.variation)} of its mean"
        )
        framework.print_table(
            ["split", "LP", "rank"],
            [(str(number), significant(split.lp, 3), str(split.rank or "-")) for number, split in enumerate(card.splits)],
        )
    if card.supports:
        framework.print_line()
        framework.print_line("share of the channel's write vector on the write support")
        framework.print_table(
            ["dimensions", "share", "median channel"],
            [(str(size), share(own), share(median)) for size, own, median in card.supports],
        )
    if card.partners:
        framework.print_line()
        framework.print_line("supernodes that the channel is most redundant with")
        framework.print_table(
            ["channel", "LP rank", "nats"],
            [(str(other), str(rank), significant(value, 3)) for other, value, rank in card.partners],
        )
    if card.dimensions:
        framework.print_line()
        framework.print_line("dimensions of the write support that the channel writes to most")
        framework.print_table(["dimension", "share"], [(str(name), share(value)) for name, value in card.dimensions])
