"""Every model type of the installed transformers, tiny and random: is it measured, is that right, can it be cut?

    python -m tests.support.census [--family causal] [--out docs/models.md] [TYPE...]

If types are named, the page keeps its other rows.

A type is *built* when `atlas build`'s own steps end in an atlas that `atlas validate` accepts, and
*verified* when, channel by channel, the measured sum of u dL/du equals the sum of W dL/dW over the write
vector, taken by plain autograd on the parameter: no hook, no trace, no probe. *Pruned* means that
`surgery prune` wrote a checkpoint that passes its own checks: stock transformers loads it and its logits
are those of the masked dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import zoo

SEQUENCES, SEQ_LEN = 16, 32


@dataclass
class Verdict:
    """The outcome for one type: "yes", or a text that says what failed."""

    model_type: str
    ffns: str = ""
    built: str = ""
    verified: str = ""
    pruned: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--family", default="causal", choices=zoo.FAMILIES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(examine(arguments.types[0], arguments.family))))
        return
    types = arguments.types or zoo.types_of(arguments.family)
    known = read_table(arguments.out) if arguments.types and arguments.out else {}
    verdicts = []
    for model_type in types:
        verdict = in_process(model_type, arguments.family)
        print(*asdict(verdict).values(), sep=" | ", flush=True)
        verdicts.append(verdict)
    if known:
        known |= {verdict.model_type: verdict for verdict in verdicts}
        verdicts = [known[name] for name in sorted(known)]
    print(summary(verdicts))
    if arguments.out:
        arguments.out.write_text(table(verdicts, arguments.family), encoding="utf-8")


def read_table(page: Path) -> dict[str, Verdict]:
    """The verdicts of a page that `table` made, by type."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {row[0]: Verdict(*row) for row in rows if row[0] != "type"}


def in_process(model_type: str, family: str) -> Verdict:
    """`examine` in a process of its own, because a model may fail in any way and take any time."""
    command = [sys.executable, "-m", "tests.support.census", "--one", "--family", family, model_type]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    except subprocess.TimeoutExpired:
        return Verdict(model_type, built="takes more than 300 s")
    try:
        return Verdict(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Verdict(model_type, built=f"crashed: {last[:200]}")


def examine(model_type: str, family: str) -> Verdict:
    import warnings

    import transformers

    from chanfmt.base.errors import ChanfmtError
    from tests.support.samples import samples
    from tests.support.tiny import tiny_tokenizer

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    verdict = Verdict(model_type)
    if model_type in zoo.UNBUILDABLE:
        verdict.built = f"no instance: {zoo.UNBUILDABLE[model_type]}"
        return verdict
    with tempfile.TemporaryDirectory() as directory:
        model = zoo.tiny(model_type, family)
        model.save_pretrained(directory)
        calib = "pydoc"
        if family in zoo.GIVEN_ARRAYS and model_type != "imagegpt" and model.main_input_name == "input_ids":
            verdict.built = "reads tokens, and so is calibrated on text"
            return verdict
        if family in zoo.GIVEN_ARRAYS:
            calib = f"{directory}/samples.npz"
            np.savez(calib, **samples(model, SEQUENCES))
        else:
            tokenizer = tiny_tokenizer()
            tokenizer.add_special_tokens({"mask_token": "<mask>"})
            tokenizer.save_pretrained(directory)
        atlas = Path(directory) / "atlas.h5"
        try:
            plan = build_atlas(Path(directory), atlas, calib)
        except ChanfmtError as error:
            verdict.built = plain(error.message, directory)
            return verdict
        verdict.ffns = describe(plan.ffns)
        verdict.built = findings(atlas) or "yes"
        verdict.verified = check_identity(plan)
        verdict.pruned = prune(atlas, directory)
    return verdict


def plain(message: str, directory: str) -> str:
    """``message`` without names that differ from run to run."""
    for name in (directory, Path(directory).name):
        message = message.replace(name, "DIR")
    return re.sub(r"(DIR/)?\.pruned\.[0-9a-f]+\.tmp(: \.pruned\.[0-9a-f]+\.tmp)?", "DIR", message)


def build_atlas(directory: Path, atlas: Path, calib: str = "pydoc") -> Any:
    """What `atlas build` of the checkpoint in ``directory`` does on ``calib``. Returns its plan."""
    from chanfmt.building.assemble import assemble
    from chanfmt.building.measure import measure
    from chanfmt.building.options import BuildOptions
    from chanfmt.building.plan import plan_build
    from chanfmt.building.session import Session
    from chanfmt.format.records import LabelSettings
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import locate_model

    options = BuildOptions(str(directory), str(atlas), calib=calib, sequences=SEQUENCES, seq_len=SEQ_LEN)
    settings = LabelSettings(rho=0.05)
    plan = plan_build(options, settings, locate_model)
    measured = measure(plan.model, plan.ffns, plan.tokens, rho=settings.rho, loss=plan.loss)
    write_atlas(assemble(plan, measured, Session(0.0)), atlas)
    return plan


def findings(atlas: Path) -> str:
    """The findings of `atlas validate`."""
    from chanfmt.algebra.validate import validate

    return "; ".join(f"{item.code} {item.path}" for item in validate(atlas) if item.rule.severity == "error")


def describe(ffns: Any) -> str:
    """``2 x 44 gated; experts 4 x 28 gated``."""
    kinds = Counter((ffn.place, ffn.kind, ffn.experts, ffn.width, ffn.gated, ffn.mixed) for ffn in ffns)
    return "; ".join(
        f"{count} {place}{'' if kind == 'dense' else ' ' + kind} {f'{experts} x ' if experts else ''}{width}"
        f"{' gated' if gated else ''}{', normed' if mixed else ''}"
        for (place, kind, experts, width, gated, mixed), count in kinds.items()
    )


def check_identity(plan: Any) -> str:
    """Whether, per channel, the sum of u dL/du is the sum of W dL/dW over the write vector; "yes" or the difference."""
    import torch

    from chanfmt.building.capture import Capture
    from chanfmt.building.statistics import FFNStatistics

    model, ffns = plan.model, plan.ffns
    writes = {
        name: model.get_parameter(name) for name in {member.write.matrix.parameter for ffn in ffns for member in ffn.members}
    }
    for parameter in writes.values():
        parameter.requires_grad_(True)
    found = [FFNStatistics(ffn, torch.device("cpu")) for ffn in ffns]
    capture = Capture(model, ffns, found)
    capture.begin(2, 0)
    with capture.running():
        plan.loss.backward(plan.tokens.batch(0, 2, model))
    worst = 0.0
    for ffn, statistics in zip(ffns, found, strict=True):
        for member, channels in zip(ffn.members, statistics.members, strict=True):
            matrix = member.write.matrix
            gradient = writes[matrix.parameter].grad
            if gradient is None or not channels.tokens:
                continue
            product = (writes[matrix.parameter] * gradient).detach().double()
            product = product if matrix.index is None else product[matrix.index]
            size = matrix.inputs if matrix.transposed else matrix.outputs
            product = product[matrix.row : matrix.row + size]
            expected = product.sum(1 if matrix.transposed else 0)
            scale = float(channels.sums["sum_abs_q"].max()) or 1.0
            worst = max(worst, float((channels.sums["sum_q"] - expected).abs().max()) / scale)
    return "yes" if worst < 1e-4 else f"differs by {worst:.1e}"


PADDED = "yes, with --allow-padding"
"""Verdict on a type whose width no config field sets: its file holds zeros in place of the removed channels."""


def prune(atlas: Path, directory: str) -> str:
    """`surgery prune` at 50%, with its checks; with ``--allow-padding`` if the file would hardly shrink."""
    error = _prune(atlas, directory)
    if "the file would shrink by" in error:
        error = _prune(atlas, directory, "--allow-padding")
        return error or PADDED
    return error or "yes"


def _prune(atlas: Path, directory: str, *more: str) -> str:
    """The error of `surgery prune`; empty if there is none."""
    import contextlib
    import io

    from surgery.cli.main import main as surgery

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = surgery(
            [
                "prune",
                str(atlas),
                "--model",
                directory,
                "--sparsity",
                "0.5",
                "--multiple-of",
                "4",
                "-o",
                f"{directory}/pruned",
                "--quiet",
                *more,
            ]
        )
    if code == 0:
        return ""
    lines = [line for line in said.getvalue().splitlines() if "error" in line] or [f"exit {code}"]
    return plain(lines[-1].replace("surgery: error: ", ""), directory)[:160]


def summary(verdicts: list[Verdict]) -> str:
    """Counts in one line."""
    instances = [verdict for verdict in verdicts if not verdict.built.startswith("no instance")]
    built = [verdict for verdict in instances if verdict.built == "yes"]
    none = [verdict for verdict in instances if "no FFN that can be measured" in verdict.built]
    verified = [verdict for verdict in built if verdict.verified == "yes"]
    padded = [verdict for verdict in built if verdict.pruned == PADDED]
    pruned = [verdict for verdict in built if verdict.pruned in ("yes", PADDED)]
    zeros = f" ({len(padded)} with zeros in place of the removed channels)" if padded else ""
    return (
        f"There are {len(verdicts)} types. {len(instances)} can be made tiny, and {len(none)} of these have no FFN. "
        f"{len(built)} were built, {len(verified)} verified, and {len(pruned)} pruned and reloaded{zeros}."
    )


def table(verdicts: list[Verdict], family: str) -> str:
    """The page of the documentation."""
    import torch
    import transformers

    rows = "\n".join(f"| {v.model_type} | {v.ffns} | {v.built} | {v.verified} | {v.pruned} |" for v in verdicts)
    return (
        f"# What is measured: {family} models\n\n`python -m tests.support.census --family {family}` generated this page with "
        f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}. It measured tiny random "
        f"instances.\n\n{summary(verdicts)}\n\n- *built*: `atlas validate` accepts the atlas.\n- *verified*: for each channel, "
        "the measured sum of u dL/du equals the sum of W dL/dW over the write vector, which plain autograd computes on the "
        "weights.\n- *pruned*: `surgery prune` at 50% wrote a checkpoint. Stock transformers loads it, and its logits are those "
        f"of the masked dense model. If no config field sets a width, `--allow-padding` was needed.\n\n| type | FFNs | built | verified | pruned |\n|---|---|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    main()
