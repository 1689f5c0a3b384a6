"""`atlas info`, and the layer table that other commands print too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chanfmt.base.text import percentage, significant
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse

    import numpy as np

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import CalibrationRecord, SpecialTokens


EXAMPLES = (
    "atlas info llama.h5",
    "atlas info hf://datasets/USER/NAME/llama.h5 --json",
)


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "info",
        "print what an atlas holds, layer by layer",
        run=_run,
        options=lambda: (AtlasOptions,),
        examples=EXAMPLES,
        description=("Print the model, the text and the settings behind an atlas, and one row of numbers for each layer."),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.hub.locate import open_atlas

    with open_atlas(arguments.file, contained=True) as atlas:
        data = info_data(atlas)
        if arguments.json:
            framework.print_json(data)
            return 0
        model, calibration, labels = data["model"], data["calibration"], data["labels"]
        revision = f" at {model['revision'][:12]}" if model["revision"] else ""
        lines = [
            (
                "model",
                f"{model['id']}{revision} ({model['model_type']}, {model['parameters']:,} parameters, "
                f"measured in {model['dtype']})",
            ),
            (
                "calibration",
                f"{calibration['sequences']} x {calibration['seq_len']} tokens of {', '.join(calibration['sources'])}",
            ),
            *(("sequences", text) for text in (_ends(atlas.calibration),) if text),
            *(("inputs", text) for text in dict.fromkeys(calibration["inputs"]) if text),
            ("loss", _loss(atlas)),
            (
                "labels",
                f"supernodes: top {percentage(labels['rho'], 2)} by {labels['score']}; halo: next {percentage(labels['eta'], 0)} by "
                f"connectivity to {labels['support_size']} dimensions",
            ),
            ("file", f"{data['format']} {data['format_version']}, {data['status']}, {data['producer']}, {data['created']}"),
            ("digest", data["content_sha256"]),
            *([("source", atlas.hub_source)] if atlas.hub_source else []),
            *(("columns", text) for text in _by_owner(data["columns"])),
        ]
        framework.print_pairs(lines)
        framework.print_line()
        print_layers(atlas, data["layers"])
    return 0


def info_data(atlas: Atlas) -> dict[str, Any]:
    """Contents of an atlas as `atlas info --json` prints them."""
    import dataclasses

    calibration = atlas.calibration
    return {
        "file": atlas.hub_source or str(atlas.path),
        **atlas.identity(),
        "calibration": {
            "sources": [row.source for row in calibration.contributions],
            "sequences": calibration.sequences,
            "seq_len": calibration.seq_len,
            "tokens": calibration.tokens,
            "tokens_stored": calibration.token_ids is not None,
            "special_tokens": _tokens(calibration.special_tokens),
            "tokenizer_special_tokens": _tokens(calibration.tokenizer_special_tokens),
            "inputs": [row.inputs for row in calibration.contributions],
            "loss": calibration.loss,
            "mean_loss": calibration.mean_loss,
            "metric_definition": calibration.metric_definition,
        },
        "labels": dataclasses.asdict(atlas.labels),
        "stacks": {
            name: {
                "kind": stack.kind,
                "gated": stack.gated,
                "activation": stack.activation,
                "layers": len(stack.layers),
                "channels": stack.n_channels,
                "experts": stack.n_experts,
            }
            for name, stack in atlas.stacks.items()
        },
        "columns": _columns(atlas),
        "layers": layer_rows(atlas),
        "build": {
            "seconds": atlas.producer.seconds,
            "peak_memory_bytes": atlas.producer.peak_memory_bytes,
            "device_peak_memory_bytes": atlas.producer.device_peak_memory_bytes,
            "hardware": atlas.producer.hardware,
            "versions": dict(atlas.producer.versions),
            "command": atlas.producer.command,
        },
    }


def _columns(atlas: Atlas) -> list[str]:
    """Names of the columns that the atlas holds besides its metrics."""
    return list(dict.fromkeys(name for stack in atlas.stacks.values() for name in stack.extension_names))


def _by_owner(names: list[str]) -> list[str]:
    """The columns of each owner in one line."""
    own: dict[str, list[str]] = {}
    for name in names:
        owner, _, rest = name.partition("/")
        own.setdefault(owner, []).append(rest)
    return [f"{owner}: {', '.join(rest)}" for owner, rest in own.items()]


def _ends(calibration: CalibrationRecord) -> str:
    """How the sequences begin and end; empty if the tokenizer puts nothing around a text and the sequences have nothing."""
    special, added = calibration.special_tokens, calibration.tokenizer_special_tokens
    if special is None:
        return f"{calibration.ends}: the file is older than the record of special tokens" if calibration.tokenizer else ""
    if special == added:
        return f"{calibration.ends}, as a text of this tokenizer does" if special else ""
    return f"{calibration.ends}; texts of this tokenizer {added}"


def _tokens(tokens: SpecialTokens | None) -> dict[str, list[int]] | None:
    return None if tokens is None else {"before": list(tokens.before), "after": list(tokens.after)}


def layer_rows(atlas: Atlas) -> list[dict[str, Any]]:
    """One row of numbers per FFN, in model order."""
    import numpy as np

    from chanfmt.analysis.mass import concentration
    from chanfmt.format import schema

    rows = []
    for block, stack in atlas.rows():
        score = _ranked_by(atlas)
        values, label = stack.row(score, block.row).ravel(), stack.row("label", block.row).ravel()
        numbers = concentration(values, atlas.labels.rho)
        row: dict[str, Any] = {
            "layer": block.layer_index,
            "stack": block.stack,
            "channels": int(values.size),
            f"{score}_mass": numbers.mass,
            "top_share": numbers.top_share,
            "effective_channels": numbers.effective_channels,
            "max_over_mean": numbers.max_over_mean,
            "gini": numbers.gini,
            "supernodes": int((label == schema.LABEL_SUPERNODE).sum()),
            "halo": int((label == schema.LABEL_HALO).sum()),
        }
        for name in ("redundancy", "redundancy_null"):
            row[f"halo_{name}"] = (
                _median(stack.row(name, block.row).ravel()[label == schema.LABEL_HALO]) if name in stack else float("nan")
            )
        if "core_covered" in stack:
            row["core_covered"] = float(np.mean(stack.row("core_covered", block.row)))
        rows.append(row)
    return rows


def print_layers(atlas: Atlas, rows: list[dict[str, Any]]) -> None:
    """`layer_rows` as a table on stdout."""
    headings, cells = layer_table(atlas, rows)
    framework.print_table(headings, cells, [headings.index(name) for name in ("max/mean", "channels", "n_eff")])


def layer_table(atlas: Atlas, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `layer_rows`."""
    from chanfmt.format import schema

    several, score = len(atlas.stacks) > 1, _ranked_by(atlas)
    headings = [
        "layer",
        *(["stack"] if several else []),
        "channels",
        f"{schema.METRIC_BY_NAME[score].heading} mass",
        f"top {atlas.labels.rho * 100:.3g}%",
        "n_eff",
        "max/mean",
        "super",
        "halo",
        "halo red",
        "null",
    ]
    return headings, [
        [
            str(row["layer"]),
            *([row["stack"]] if several else []),
            f"{row['channels']:,}",
            significant(row[f"{score}_mass"], 3),
            percentage(row["top_share"]),
            significant(row["effective_channels"], 4),
            significant(row["max_over_mean"], 4),
            str(row["supernodes"]),
            str(row["halo"]),
            significant(row["halo_redundancy"], 2),
            significant(row["halo_redundancy_null"], 2),
        ]
        for row in rows
    ]


def _ranked_by(atlas: Atlas) -> str:
    """The metric of the layer table: LP, or the metric that ranks the supernodes if the atlas holds no LP."""
    return "lp" if any("lp" in stack for stack in atlas.stacks.values()) else atlas.labels.score


def _loss(atlas: Atlas) -> str:
    from chanfmt.algebra.metrics import holds_gradients

    if not holds_gradients(atlas.stacks.values()):
        return "none: the atlas holds no metric that needs a gradient"
    mean = atlas.calibration.mean_loss
    return f"{atlas.calibration.loss}; mean {'unknown' if math.isnan(mean) else f'{mean:.3f}'}"


def _median(values: np.ndarray) -> float:
    import numpy as np

    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")
