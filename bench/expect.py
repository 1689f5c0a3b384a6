"""Measure what cuts of a model cost, and write the numbers into the package and into docs/expect.md.

    python bench/expect.py MODEL --atlas FILE --name NAME --calibration NAME --text NAME DOMAIN SOURCE [--text ...]
                           [--methods scar-prot,scar-lp] [--sparsity 0.1:0.6:0.1] [--recover none,lstsq] -o DIR

Every cut is measured in place, as ``surgery sweep`` measures it, on all texts at once: a recovery is computed once for all of
them. The rows of DIR are not measured again; an interrupted refit begins again. When all rows are there,
``surgery/planning/measured.json`` gets the rows of this model in place of its earlier ones, and the table of docs/expect.md is
written anew. ``--publish`` writes both from the rows that DIR has already, without measuring. ``--render`` writes the table only.

No path gets into these files: texts and models have the names that the command line gives them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.version import __version__
from chanfmt.format.reader import Atlas
from surgery.evaluation.perplexity import BlockLosses, paired_bootstrap
from surgery.experiments.columns import losses_of
from surgery.experiments.sweep_plan import DENSE, SweepOptions, plan_runs
from surgery.planning.measured import FORMAT, MeasuredCut, cuts_of
from surgery.planning.plan import make_plan
from surgery.planning.sizes import count_text
from surgery.recovery.options import RECOVERIES, REFITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.experiments.subject import Subject
    from surgery.experiments.sweep_plan import Run
    from surgery.planning.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "surgery" / "planning" / "measured.json", ROOT / "docs" / "expect.md"
BEGIN, END = "<!-- measured: bench/expect.py -->", "<!-- end -->"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model", nargs="?", help="Hub id, directory or .gguf file")
    result.add_argument("--atlas", type=Path, help="atlas of MODEL")
    result.add_argument("--name", help="name of the model in the results, such as SmolLM2-135M")
    result.add_argument(
        "--weights", default="", help="how its weights are stored, such as Q4_1 (default: the model's own floats)"
    )
    result.add_argument("--calibration", help="name of the text that the atlas was measured on, such as 'WikiText-2 validation'")
    result.add_argument("--methods", default="scar-prot,scar-lp", help="methods, separated by commas (default: %(default)s)")
    result.add_argument(
        "--sparsity", default="0.1:0.6:0.1", help="shares of channels to remove, measured in this order (default: %(default)s)"
    )
    result.add_argument("--recover", default="none,lstsq", help="recoveries on the atlas's own tokens (default: %(default)s)")
    result.add_argument(
        "--text",
        action="append",
        nargs=3,
        default=[],
        metavar=("NAME", "DOMAIN", "SOURCE"),
        help="text to evaluate on: its name and its domain in the results, and its source as --data of surgery eval takes it; repeat",
    )
    result.add_argument("--max-tokens", type=int, default=16384, help="tokens of each text at most (default: %(default)s)")
    result.add_argument("--seq-len", type=int, default=2048, help="tokens in a block (default: %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    result.add_argument("--publish", action="store_true", help="write the rows that DIR has already, without measuring")
    result.add_argument("--render", action="store_true", help="write the table of the page from the data, and stop")
    result.add_argument("--data", type=Path, default=DATA, help=argparse.SUPPRESS)
    result.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    result.add_argument("-o", "--output", type=Path, help="directory for the rows")
    return result


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if not arguments.render:
            run(arguments)
        content = read_data(arguments.data)
        write_page(arguments.page, cuts_of(content))
    except ChanfmtError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Measure every row that is missing, unless only publishing is asked for, and put the rows into the data."""
    for name in ("model", "atlas", "name", "calibration", "text", "output"):
        if not getattr(arguments, name):
            raise UsageError(f"{'MODEL' if name == 'model' else f'--{name}'} is missing", hint="see --help")
    with Atlas.open(arguments.atlas) as atlas:
        options = SweepOptions(methods=arguments.methods, sparsity=arguments.sparsity, recover=arguments.recover)
        runs, _ = plan_runs(atlas, options)
        if not arguments.publish:
            measure(arguments, atlas, runs, options.shared())
        publish(arguments, atlas, runs)


def measure(arguments: argparse.Namespace, atlas: Atlas, runs: Sequence[Run], shared: dict[str, Any]) -> None:
    """Measure ``runs`` on all texts, into the directory of the results."""
    from surgery.experiments.results import check_directory, claim
    from surgery.experiments.sweep import SWEEP_FORMAT, measure_runs

    check_directory(arguments.output, SWEEP_FORMAT)
    with claim(arguments.output):
        measure_runs(atlas, joint_subject(arguments, atlas), runs, shared, arguments.output)


def joint_subject(arguments: argparse.Namespace, atlas: Atlas) -> Subject:
    """The model with the tokens of all texts behind each other. Each text but the last is cut to whole blocks."""
    from surgery.evaluation.given import given_text
    from surgery.evaluation.protocol import PROTOCOLS, prepare_text
    from surgery.experiments.subject import open_subject

    limits = {"seq_len": arguments.seq_len, "max_tokens": arguments.max_tokens}
    subject = open_subject(atlas, arguments.model, arguments.text[0][2], **limits)
    assert subject.source is not None
    parts, texts = [], []
    for number, (_, _, source) in enumerate(arguments.text):
        ids = prepare_text(arguments.model, subject.source, given_text(source), PROTOCOLS["paper"], **limits).ids
        if number < len(arguments.text) - 1:
            ids = ids[: len(ids) // arguments.seq_len * arguments.seq_len]
        if len(ids) < 2:
            raise UsageError(f"{source} has no whole block of {arguments.seq_len} tokens", hint="use a smaller --seq-len")
        parts.append(ids)
        texts.append({"tokens": len(ids), "sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()})
    identity = subject.identity | {"data": f"{len(parts)} texts", "tokens": sum(map(len, parts)), "texts": texts}
    identity["tokens_sha256"] = hashlib.sha256("".join(text["sha256"] for text in texts).encode()).hexdigest()
    return dataclasses.replace(subject, token_ids=np.concatenate(parts), identity=identity)


# The data.


def publish(arguments: argparse.Namespace, atlas: Atlas, runs: Sequence[Run]) -> None:
    """Put the rows of the directory into the data, in place of earlier rows of the same run."""
    path = arguments.output / "results.json"
    if not path.exists():
        raise UsageError(f"{arguments.output} has no rows", hint="leave out --publish to measure them")
    results = json.loads(path.read_text(encoding="utf-8"))
    found = run_of(arguments, atlas, runs, results)
    content = read_data(arguments.data)
    content["runs"] = merged(content["runs"], found)
    write_data(arguments.data, content)


def run_of(arguments: argparse.Namespace, atlas: Atlas, runs: Sequence[Run], results: dict[str, Any]) -> dict[str, Any]:
    """One run of the data: what its cuts have in common, and the cuts of ``runs`` that were measured."""
    identity, rows = results["identity"], results["rows"]
    if len(identity["texts"]) != len(arguments.text):
        raise UsageError(f"{arguments.output} was measured on {len(identity['texts'])} texts", hint="name as many with --text")
    lengths = [text["tokens"] for text in identity["texts"]]
    dense = split(next(row for row in rows if row["method"] == DENSE), lengths, identity["seq_len"])
    calibration = atlas.calibration
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    cuts = []
    for item in runs:
        row = next(
            (
                row
                for row in rows
                if row["channels_sha256"] == item.channels_sha256 and all(row[k] == v for k, v in item.key.items())
            ),
            None,
        )
        if item.options is None or row is None:
            continue
        plan = make_plan(atlas, item.options)
        compared = [
            paired_bootstrap(before, after, seed=arguments.seed)
            for before, after in zip(dense, split(row, lengths, identity["seq_len"]), strict=True)
        ]
        cuts.append(
            {
                "method": plan.method,
                "allocation": plan.allocation,
                "recovery": item.recovery.recover,
                "recovery_tokens": calibration.tokens if item.recovery.recover in REFITS else 0,
                "channels_removed": round(plan.sparsity_reached, 4),
                "parameters_removed": round(parameters_removed(arguments.model, plan), 4),
                "above": [[rounded(value) for value in (item.difference, item.low, item.high)] for item in compared],
                "date": today,
                "version": __version__,
            }
        )
    return {
        "model": arguments.name,
        "weights": arguments.weights,
        "model_type": atlas.model.model_type,
        "parameters": atlas.model.parameters,
        "fingerprint": atlas.model.fingerprint,
        "calibration": arguments.calibration,
        "calibration_tokens": calibration.tokens,
        "texts": [
            {
                "name": name,
                "domain": domain,
                "tokens": text["tokens"],
                "tokens_sha256": text["sha256"],
                "blocks": len(losses.nll),
                "dense": rounded(losses.mean),
            }
            for (name, domain, _), text, losses in zip(arguments.text, identity["texts"], dense, strict=True)
        ],
        "seq_len": identity["seq_len"],
        "seed": arguments.seed,
        "dtype": identity["dtype"],
        "command": command_of(arguments),
        "cuts": cuts,
    }


def parameters_removed(model: str, plan: PruningPlan) -> float:
    """Share of the model's parameters that ``plan`` removes. An older atlas does not say how many a channel has."""
    if plan.parameters_after is not None:
        return 1 - plan.parameters_after / plan.parameters
    from chanfmt.hub.locate import locate_model
    from chanfmt.models.widths import channel_parameters

    index = locate_model(model).index
    removed = sum(
        channel_parameters(block, index) * max(1, block.n_experts) * (block.n_channels - block.n_kept) for block in plan.blocks
    )
    return removed / plan.parameters


def split(row: dict[str, Any], lengths: Sequence[int], seq_len: int) -> list[BlockLosses]:
    """The losses of ``row`` on each text of so many tokens."""
    losses, first, found = losses_of(row), 0, []
    for length in lengths:
        # A last block of one token predicts nothing and has no loss.
        last = first + (length + seq_len - 2) // seq_len
        found.append(BlockLosses(losses.nll[first:last], losses.predicted[first:last]))
        first = last
    return found


def rounded(value: float) -> float | None:
    """``value`` to four decimals; None if it is not finite."""
    return round(value, 4) if np.isfinite(value) else None


def command_of(arguments: argparse.Namespace) -> str:
    """The command line, with the names of files in place of paths."""
    words = ["python", "bench/expect.py", Path(arguments.model).name if os.path.exists(arguments.model) else arguments.model]
    words += ["--atlas", arguments.atlas.name, "--name", arguments.name, "--calibration", arguments.calibration]
    words += ["--weights", arguments.weights] if arguments.weights else []
    words += ["--methods", arguments.methods, "--sparsity", arguments.sparsity]
    words += ["--recover", arguments.recover, "--seq-len", str(arguments.seq_len), "--max-tokens", str(arguments.max_tokens)]
    for name, domain, source in arguments.text:
        words += ["--text", name, domain, Path(source).name if os.path.exists(source) else source]
    words += ["-o", arguments.output.name]
    return shlex.join(words)


def merged(runs: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """``runs`` with ``found`` in place of an earlier run on the same model and texts. Equal cuts keep their date and version."""
    identity = ("model", "fingerprint", "calibration_tokens", "seq_len")
    kept, result, replaced = ("date", "version"), [], False
    for run in runs:
        same = all(run[name] == found[name] for name in identity) and [text["tokens_sha256"] for text in run["texts"]] == [
            text["tokens_sha256"] for text in found["texts"]
        ]
        if not same:
            result.append(run)
            continue
        before = [{name: value for name, value in cut.items() if name not in kept} for cut in run["cuts"]]
        for cut in found["cuts"]:
            content = {name: value for name, value in cut.items() if name not in kept}
            if content in before:
                cut.update({name: run["cuts"][before.index(content)][name] for name in kept})
        result.append(found)
        replaced = True
    result += [] if replaced else [found]
    return sorted(result, key=lambda run: (run["parameters"], run["model"]))


def read_data(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"format": FORMAT, "runs": []}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_data(path: Path, content: dict[str, Any]) -> None:
    """Write the data whole, one cut per line."""
    runs = []
    for run in content["runs"]:
        head = json.dumps({name: value for name, value in run.items() if name != "cuts"}, ensure_ascii=False)
        runs.append(head[:-1] + ', "cuts": [\n' + ",\n".join(map(json.dumps, run["cuts"])) + "\n]}")
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(f'{{"format": {json.dumps(FORMAT)}, "runs": [\n' + ",\n".join(runs) + "\n]}\n", encoding="utf-8")


# The page.


def write_page(path: Path, cuts: Sequence[MeasuredCut]) -> None:
    """Write the table between the marks of the page anew."""
    said = path.read_text(encoding="utf-8")
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(rendered(said, cuts), encoding="utf-8")


def rendered(page: str, cuts: Sequence[MeasuredCut]) -> str:
    """``page`` with the tables of ``cuts`` between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise UsageError(f"the page has no place for the table: {BEGIN} ... {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{tables(cuts)}\n{END}", page)


def tables(cuts: Sequence[MeasuredCut]) -> str:
    """One section with a table for each run."""
    groups: dict[tuple[Any, ...], list[MeasuredCut]] = {}
    for cut in cuts:
        texts = tuple((loss.text, loss.tokens) for loss in cut.losses)
        groups.setdefault((cut.model, cut.calibration, cut.calibration_tokens, cut.seq_len, texts), []).append(cut)
    return "\n\n".join(section(group) for group in groups.values()) or "Nothing is measured yet."


def section(cuts: Sequence[MeasuredCut]) -> str:
    first = cuts[0]
    weights = f", weights from {first.weights}" if first.weights else ""
    days = sorted({cut.date for cut in cuts})
    versions = ", ".join(sorted({cut.version for cut in cuts}))
    measured = "; ".join(
        f"{loss.text} ({loss.domain}), {loss.tokens:,} tokens in {loss.blocks} block{'' if loss.blocks == 1 else 's'}, "
        f"dense {loss.dense:.4f} nats per token"
        for loss in first.losses
    )
    lines = [
        f"### {first.model}",
        "",
        f"{count_text(first.parameters)} parameters ({first.model_type}{weights}). The channels were chosen on "
        f"{first.calibration_tokens:,} tokens of {first.calibration}, and a refit uses the same tokens. Measured on {measured}. Blocks of "
        f"{first.seq_len:,} tokens, bootstrap seed {first.seed}, chanfmt {versions}, {' to '.join(dict.fromkeys((days[0], days[-1])))}.",
        "",
        "| method | recovery | channels removed | parameters removed |" + "".join(f" {loss.text} |" for loss in first.losses),
        "|---|---|---:|---:|" + "---:|" * len(first.losses),
        *(row(cut) for cut in sorted(cuts, key=place)),
        "",
        "```",
        first.command,
        "```",
    ]
    return "\n".join(lines)


def place(cut: MeasuredCut) -> tuple[Any, ...]:
    return cut.method, cut.allocation, list(RECOVERIES).index(cut.recovery), cut.channels_removed


def row(cut: MeasuredCut) -> str:
    method = cut.method + ("" if cut.allocation == "uniform" else f", {cut.allocation}")
    cells = [method, cut.recovery, f"{cut.channels_removed:.1%}", f"{cut.parameters_removed:.1%}"]
    for loss in cut.losses:
        interval = "" if loss.low is None or loss.high is None else f" ({loss.low:+.3f} to {loss.high:+.3f})"
        cells.append(f"{loss.above:+.3f}{interval}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
