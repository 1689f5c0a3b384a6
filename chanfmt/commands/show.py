"""`atlas show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt import console
from chanfmt.errors import AtlasError, UsageError

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from chanfmt import schema

    parser = commands.add_parser("show", help="the channels of one layer")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--layer", type=int, required=True, help="layer index in the model")
    parser.add_argument("--stack", help="which FFN, where a layer has several")
    parser.add_argument("--sort", default="lp", choices=[*schema.METRIC_BY_NAME, "channel"], metavar="METRIC",
                        help="metric to sort by, largest first, or channel (default: lp)")
    parser.add_argument("--top", type=int, default=20, help="rows to print, 0 for all (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from chanfmt import schema
    from chanfmt.atlas import Atlas

    if arguments.top < 0:
        raise UsageError(f"--top must be 0 or more, not {arguments.top}")
    with Atlas.open(arguments.file, contained=True) as atlas:
        block = atlas.block(arguments.layer, arguments.stack)
        stack = atlas.stacks[block.stack]
        if stack.kind == "experts":
            raise AtlasError(f"layer {block.layer_index} has {block.n_experts} experts; showing one is not possible yet")
        names = [name for name in stack.metrics if not np.isnan(stack.row(name, block.row)).all()]
        if arguments.sort not in ("channel", *names):
            raise UsageError(f"layer {block.layer_index} has no {arguments.sort}", hint=f"metrics: {', '.join(names)}")
        values = {name: stack.row(name, block.row) for name in names}
        label = stack.row("label", block.row)
        order = np.arange(stack.n_channels)
        if arguments.sort != "channel":
            # NaN is unknown, not large: it goes last.
            order = np.argsort(-np.nan_to_num(values[arguments.sort], nan=-np.inf), kind="stable")
        order = order[: arguments.top or None]
        if arguments.json:
            console.print_json({
                "layer": block.layer_index, "stack": block.stack, "module": block.module,
                "channels": [{"channel": int(channel), "label": schema.LABELS.get(int(label[channel]), "?"),
                              **{name: float(values[name][channel]) for name in names}} for channel in order],
            })
            return 0
        headings = ["rank", "channel", "label", *(schema.METRIC_BY_NAME[name].heading for name in names)]
        console.print_table(headings, [
            [str(rank), str(channel), schema.LABELS.get(int(label[channel]), "?"),
             *(console.significant(float(values[name][channel])) for name in names)]
            for rank, channel in enumerate(order, 1)
        ])
    return 0
