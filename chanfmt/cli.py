"""The `atlas` command. Importing this module loads neither torch nor h5py; commands load what they need."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from chanfmt import console
from chanfmt.errors import AtlasError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import numpy as np

    from chanfmt.atlas import Atlas


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `atlas`. Returns the exit code."""
    parser, commands = console.make_parser("atlas", "Measure which FFN channels of a language model matter.")
    _add_build(commands)
    _add_info(commands)
    _add_show(commands)
    return console.run_command(parser, arguments)


def _add_build(commands: Any) -> None:
    from chanfmt.produce.options import BuildOptions
    from chanfmt.records import LabelSettings

    parser = commands.add_parser("build", help="measure a model and write its atlas", description=(
        "Measure every FFN channel of MODEL in one pass over calibration text and write the result to FILE."))
    console.add_options(parser, BuildOptions)
    console.add_options(parser, LabelSettings)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_build)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what an atlas holds, layer by layer")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_info)


def _add_show(commands: Any) -> None:
    from chanfmt import schema

    parser = commands.add_parser("show", help="the channels of one layer")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--layer", type=int, required=True, help="layer index in the model")
    parser.add_argument("--stack", help="which FFN, where a layer has several")
    parser.add_argument("--sort", default="lp", choices=[*schema.METRIC_BY_NAME, "channel"], metavar="METRIC",
                        help="metric to sort by, largest first, or channel (default: lp)")
    parser.add_argument("--top", type=int, default=20, help="rows to print, 0 for all (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_show)


def _build(arguments: argparse.Namespace) -> int:
    from chanfmt.produce.options import BuildOptions
    from chanfmt.records import LabelSettings

    options = console.parse_options(arguments, BuildOptions)
    settings = console.parse_options(arguments, LabelSettings)
    from chanfmt.produce.build import build, plan_build

    if options.dry_run:
        summary = plan_build(options, settings).summary()
        if arguments.json:
            console.print_json(summary)
        else:
            console.print_table(("", ""), [(key, _cell(value)) for key, value in summary.items()])
        return 0
    path = build(options, settings)
    console.say(f"wrote {path}; browse it with: atlas-tui {path}", quiet=options.quiet)
    with _open(str(path)) as atlas:
        if arguments.json:
            console.print_json(_info_data(atlas))
        else:
            _print_layers(atlas, _layer_rows(atlas))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    with _open(arguments.file) as atlas:
        data = _info_data(atlas)
        if arguments.json:
            console.print_json(data)
            return 0
        model, calibration, labels = data["model"], data["calibration"], data["labels"]
        revision = f" at {model['revision'][:12]}" if model["revision"] else ""
        lines = [
            ("model", f"{model['id']}{revision} ({model['model_type']}, {model['parameters']:,} parameters, "
                      f"measured in {model['dtype']})"),
            ("calibration", f"{calibration['sequences']} x {calibration['seq_len']} tokens of "
                            f"{', '.join(calibration['sources'])}; mean loss {calibration['mean_loss']:.3f} nats"),
            ("labels", f"supernodes: top {labels['rho']:.2%} by {labels['score']}; halo: next {labels['eta']:.0%} by "
                       f"connectivity to {labels['support_size']} dimensions"),
            ("file", f"{data['format']} {data['format_version']}, {data['status']}, {data['producer']}, {data['created']}"),
            ("digest", data["content_sha256"]),
        ]
        for name, text in lines:
            print(f"{name:<12} {console.printable(text)}")
        print()
        _print_layers(atlas, data["layers"])
    return 0


def _show(arguments: argparse.Namespace) -> int:
    import numpy as np

    from chanfmt import schema

    if arguments.top < 0:
        raise UsageError(f"--top must be 0 or more, not {arguments.top}")
    with _open(arguments.file) as atlas:
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


def _open(path: str) -> Atlas:
    from chanfmt.atlas import Atlas

    return Atlas.open(path)


def _info_data(atlas: Atlas) -> dict[str, Any]:
    import dataclasses

    from chanfmt import schema

    calibration = atlas.calibration
    model = dataclasses.asdict(atlas.model)
    del model["config"]
    return {
        "file": str(atlas.path),
        "format": schema.FORMAT,
        "format_version": atlas.format_version,
        "status": atlas.status,
        "producer": atlas.producer_name,
        "created": atlas.created,
        "content_sha256": atlas.content_sha256,
        "model": model,
        "calibration": {
            "sources": [row.source for row in calibration.contributions],
            "sequences": calibration.sequences,
            "seq_len": calibration.seq_len,
            "tokens": calibration.tokens,
            "tokens_stored": calibration.token_ids is not None,
            "loss": calibration.loss,
            "mean_loss": calibration.mean_loss,
            "metric_definition": calibration.metric_definition,
        },
        "labels": dataclasses.asdict(atlas.labels),
        "stacks": {name: {"kind": stack.kind, "gated": stack.gated, "activation": stack.activation,
                          "layers": len(stack.layers), "channels": stack.n_channels, "experts": stack.n_experts}
                   for name, stack in atlas.stacks.items()},
        "layers": _layer_rows(atlas),
        "build": {"seconds": atlas.producer.seconds, "peak_memory_bytes": atlas.producer.peak_memory_bytes,
                  "hardware": atlas.producer.hardware, "versions": dict(atlas.producer.versions),
                  "command": atlas.producer.command},
    }


def _layer_rows(atlas: Atlas) -> list[dict[str, Any]]:
    import numpy as np

    from chanfmt import schema
    from chanfmt.analysis.concentration import concentration

    rows = []
    for block, stack in atlas.rows():
        lp, label = stack.row("lp", block.row).ravel(), stack.row("label", block.row).ravel()
        numbers = concentration(lp, atlas.labels.rho)
        row: dict[str, Any] = {
            "layer": block.layer_index, "stack": block.stack, "channels": int(lp.size),
            "lp_mass": numbers.mass, "top_share": numbers.top_share,
            "effective_channels": numbers.effective_channels, "max_over_mean": numbers.max_over_mean,
            "gini": numbers.gini,
            "supernodes": int((label == schema.LABEL_SUPERNODE).sum()), "halo": int((label == schema.LABEL_HALO).sum()),
        }
        for name in ("redundancy", "redundancy_null"):
            row[f"halo_{name}"] = _median(stack.row(name, block.row).ravel()[label == schema.LABEL_HALO]) \
                if name in stack else float("nan")
        if "core_covered" in stack:
            row["core_covered"] = float(np.mean(stack.row("core_covered", block.row)))
        rows.append(row)
    return rows


def _print_layers(atlas: Atlas, rows: list[dict[str, Any]]) -> None:
    several = len(atlas.stacks) > 1
    headings = ["layer", *(["stack"] if several else []), "channels", "LP mass",
                f"top {atlas.labels.rho * 100:.3g}%", "n_eff", "max/mean", "super", "halo", "halo red", "null"]
    console.print_table(headings, [
        [str(row["layer"]), *([row["stack"]] if several else []), f"{row['channels']:,}",
         console.significant(row["lp_mass"], 3), f"{row['top_share']:.1%}",
         console.significant(row["effective_channels"], 4), console.significant(row["max_over_mean"], 4),
         str(row["supernodes"]), str(row["halo"]),
         console.significant(row["halo_redundancy"], 2), console.significant(row["halo_redundancy_null"], 2)]
        for row in rows
    ])


def _median(values: np.ndarray) -> float:
    import numpy as np

    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
