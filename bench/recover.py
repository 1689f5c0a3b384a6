"""Measure what each recovery makes of the same cut: ours beside those that others published.

    python bench/recover.py MODEL [--atlas FILE] [--calib TEXT] [--recover-tokens N] [--text TEXT] [--held-out pydoc]
                            [--sparsity 0.5] [--methods NAME,...] -o DIR

Every row has the same model, the same kept channels (--scores, the same share of every FFN) and the same tokens for the refit;
only `flap` and the rows without recovery may have other scores. Every row is measured in a process of its own. The methods of
others are written anew in `bench/recovery_baselines.py`, which names their sources and defaults. They change a loaded model in
place. Ours run as ``surgery prune``, and what is measured is the checkpoint that it writes.

DIR gets results.json and page.md, the page that the script also prints. Rows that DIR already has are not measured again. The
names for --methods:

- dense, and any scores without recovery: activation, scar-lp, wanda, ...
- bias, lstsq, block, ...: every --recover of ``surgery prune``
- flap-bias: FLAP's bias for the channels of --scores; flap: FLAP's bias and scores
- grail, osscar, osscar-fullseq, dense-lstsq: linear fits with the penalty that is their authors' default, or with another one
  that follows a colon, as in grail:0.01
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import chanfmt
from chanfmt.base.choices import unknown
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.format.reader import Atlas
from surgery.planning.methods import METHODS
from surgery.planning.options import PlanOptions
from surgery.recovery.options import RECOVERIES, REFITS, RecoveryOptions

FORMAT = "recover/1"
OURS = tuple(name for name in RECOVERIES if name not in ("none", "bias"))
"""The recoveries that the others are compared with. ``bias`` is FLAP's."""
FITS = ("grail", "osscar", "osscar-fullseq", "dense-lstsq")
BASELINES = ("flap", "flap-bias", *FITS)
GRID = (
    *("dense-lstsq", "dense-lstsq:0.1"),
    *("grail:0", "grail", "grail:0.01", "grail:0.1"),
    *("osscar", "osscar:0.1"),
    *("osscar-fullseq", "osscar-fullseq:0.1"),
)
"""The penalties of others: their defaults, and larger ones, which suit fewer tokens. GRAIL's README passes 0."""
DEFAULT = ("dense", "activation", "wanda", "scar-lp", "flap", "flap-bias", "bias", *GRID, *OURS)
IDENTITY = ("model", "fingerprint", "atlas", "scores", "sparsity", "calib", "recover_tokens", "texts", "seq_len", "seed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, directory or .gguf file")
    parser.add_argument("--atlas", help="atlas of MODEL; by default, one is built in DIR on --calib")
    parser.add_argument("--calib", action="append", default=[], metavar="SOURCE[=WEIGHT]", help="text to measure and refit on")
    parser.add_argument("--sequences", type=int, default=64, help="sequences of 512 tokens for an atlas that is built")
    parser.add_argument("--recover-tokens", metavar="N", help="tokens of --calib to refit on; by default, the atlas's tokens")
    parser.add_argument("--text", default="wikitext2", help="text in the domain of --calib to evaluate on")
    parser.add_argument("--held-out", default="pydoc", help="text of another domain to evaluate on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--scores", default="scar-lp", help="the scores that choose the channels")
    parser.add_argument("--seed", type=int, default=0, help="seed of --scores random, of an atlas, and of the bootstrap")
    parser.add_argument("--max-tokens", type=int, default=32768, help="tokens of --text")
    parser.add_argument("--held-out-tokens", type=int, help="tokens of --held-out (default: --max-tokens)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a block of the evaluation")
    parser.add_argument("--methods", default=",".join(DEFAULT), help="rows to measure (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.row:
            print(json.dumps(measure(arguments, arguments.row)))
        else:
            run(arguments)
    except ChanfmtError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Measure every row that is missing, each in a process of its own, and print the page."""
    names = tuple(dict.fromkeys(name for item in arguments.methods.split(",") if (name := item.strip())))
    for name in names:
        check_name(name)
    if arguments.recover_tokens and not arguments.calib:
        raise UsageError("--recover-tokens draws tokens from --calib, which is not given", hint="add --calib SOURCE")
    arguments.output.mkdir(exist_ok=True)
    path = arguments.output / "results.json"
    identity = identity_of(arguments)
    results = read(path, identity)
    for name in names:
        if name in results["rows"] and "error" not in results["rows"][name]:
            continue
        print(f"measuring {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UsageError(f"the row {name} failed with exit code {done.returncode}; the rows before it are in {path}")
        results["rows"][name] = json.loads(done.stdout.splitlines()[-1])
        results["rows"] = {key: results["rows"][key] for key in sorted(results["rows"], key=order)}
        write(path, results)
    check_alike(results["rows"])
    said = page(results)
    (arguments.output / "page.md").write_text(said, encoding="utf-8")
    print(said)


def check_name(name: str) -> None:
    """Raise `UsageError` unless ``name`` is that of a row."""
    stem, _, ridge = name.partition(":")
    known = ("dense", *METHODS, *BASELINES, *(key for key in RECOVERIES if key != "none"))
    if stem not in known:
        raise unknown("row", stem, known)
    try:
        fits = not ridge or (float(ridge) >= 0 and stem in FITS)
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"{name} is not a row: {stem} takes no such penalty", hint="write it as in grail:0.01")


def order(name: str) -> tuple[int, str]:
    """Place of a row in the results: as in `DEFAULT`, and other rows after those of their kind."""
    stem = name.partition(":")[0]
    return DEFAULT.index(name if name in DEFAULT else stem) if stem in DEFAULT else len(DEFAULT), name


def atlas_of(arguments: argparse.Namespace) -> Path:
    """The atlas, built if there is none."""
    if arguments.atlas:
        return Path(arguments.atlas)
    path = arguments.output / "atlas.h5"
    if not path.exists():
        if not arguments.calib:
            raise UsageError("no atlas is given, and no text to build one on", hint="add --atlas FILE or --calib SOURCE")
        command = [sys.executable, "-m", "chanfmt", "build", arguments.model, "-o", str(path), "--quiet"]
        command += ["--sequences", str(arguments.sequences), "--seed", str(arguments.seed)]
        command += [word for source in arguments.calib for word in ("--calib", source)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise UsageError("the atlas could not be built", hint=shlex.join(command))
    return path


def identity_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    with chanfmt.open(str(atlas_of(arguments))) as atlas:
        record = atlas.calibration
        sources = [Path(item.source).name for item in record.contributions]
        held_out_tokens = arguments.max_tokens if arguments.held_out_tokens is None else arguments.held_out_tokens
        return {
            "model": atlas.model.id,
            "fingerprint": atlas.model.fingerprint,
            "atlas": {"sha256": atlas.content_sha256, "tokens": f"{record.sequences} x {record.seq_len}", "sources": sources},
            "scores": arguments.scores,
            "sparsity": arguments.sparsity,
            "calib": arguments.calib if arguments.recover_tokens else [],
            "recover_tokens": arguments.recover_tokens,
            "texts": [[arguments.text, arguments.max_tokens], [arguments.held_out, held_out_tokens]],
            "seq_len": arguments.seq_len,
            "seed": arguments.seed,
        }


def read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results at ``path``, without rows if there are none yet. Raises `UsageError` if they are of another bench."""
    if not path.exists():
        return {"format": FORMAT, "identity": identity, "rows": {}}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results.get("format") != FORMAT:
        raise UsageError(f"{path} is not from this script", hint="choose another -o")
    other = [name for name in IDENTITY if results["identity"].get(name) != identity[name]]
    if other:
        raise UsageError(f"{path} was measured with another {', '.join(other)}", hint="choose another -o")
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results whole, one row per line."""
    head = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in ("format", "identity")]
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in results["rows"].items())
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("{" + ",\n".join([*head, f'"rows": {{\n{rows}\n}}']) + "}\n", encoding="utf-8")


def check_alike(rows: dict[str, Any]) -> None:
    """Raise `UsageError` if two rows were fitted or evaluated on different tokens."""
    found: dict[str, str] = {}
    for name, row in rows.items():
        digests = {text["text"]: text["tokens_sha256"] for text in row.get("texts", ())}
        if row.get("refit_sha256"):
            digests["the refit"] = row["refit_sha256"]
        for what, digest in digests.items():
            if found.setdefault(what, digest) != digest:
                raise UsageError(f"the row {name} has other tokens of {what} than the rows before it", hint="choose another -o")


# What one process does for one row.


def measure(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure one row: recover, then evaluate on both texts. Returns the row."""
    row: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", "bench/recover.py", *sys.argv[1:-2]]),
    }
    made = arguments.output / "checkpoints" / name
    if name in RECOVERIES and name != "none":
        # Before torch is imported: a process that is started inherits the memory peak of the one that starts it.
        found = prune(arguments, name, made)
        if "error" in found:
            return row | found
        row |= found
    from chanfmt.hub.locate import locate_model
    from surgery.evaluation.evaluate import evaluate

    row["machine"] = machine()
    texts = identity_of(arguments)["texts"]
    source = locate_model(arguments.model)
    with Atlas.open(atlas_of(arguments)) as atlas:
        refit = None
        # The biases of `surgery prune` come from sums in the atlas, whatever --recover-tokens says.
        if name.partition(":")[0] in (*BASELINES, *OURS) or (name == "bias" and not arguments.recover_tokens):
            refit = refit_tokens(arguments, atlas, source)
            row["refit_tokens"] = refit.size
            row["refit_sha256"] = hashlib.sha256(refit.astype("<i4").tobytes()).hexdigest()
        if "seconds" in row:
            model: Any = str(made)
        else:
            model, costs = in_memory(arguments, name, atlas, source, refit)
            row |= costs
            model = (model, source.tokenizer)
    row["texts"] = []
    for text, tokens in texts:
        found = evaluate(model, text, seq_len=arguments.seq_len, max_tokens=tokens, seed=arguments.seed)[0]
        row["parameters"] = found.parameters
        losses = {"": found.losses} | ({", blocks begin with BOS": found.with_bos} if found.with_bos else {})
        row["texts"] += [
            {
                "text": Path(text).name + suffix,
                "tokens": len(found.tokens.ids),
                "tokens_sha256": found.tokens.sha256,
                "block_nll": value.nll.tolist(),
                "block_predicted": value.predicted.tolist(),
            }
            for suffix, value in losses.items()
        ]
    shutil.rmtree(made, ignore_errors=True)
    return row


def prune(arguments: argparse.Namespace, name: str, directory: Path) -> dict[str, Any]:
    """Run ``surgery prune --recover name``. Returns seconds and peak memory of the command, or its error."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(exist_ok=True)
    continued = directory.with_name(f"{name}.partial").exists()
    command = [sys.executable, "-m", "surgery", "prune", str(atlas_of(arguments)), "--model", arguments.model]
    command += ["--method", arguments.scores, "--sparsity", str(arguments.sparsity), "--seed", str(arguments.seed)]
    command += ["--recover", name, "-o", str(directory), "--quiet"]
    if arguments.recover_tokens and name in REFITS:
        command += [word for source in arguments.calib for word in ("--recover-text", source)]
        command += ["--recover-tokens", arguments.recover_tokens]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        # The error is one line, which begins with the name of the command. Its hint follows.
        lines = [line for line in said.splitlines() if line.startswith("surgery")] or said.splitlines()[-1:] or ["no message"]
        return {"error": f"{shlex.join(['surgery', *command[3:]])}: {lines[0].removeprefix('surgery: ')}"}
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "continued": continued,
    }


def refit_tokens(arguments: argparse.Namespace, atlas: Atlas, source: Any) -> np.ndarray:
    """The tokens that ``surgery prune`` refits on, int32 (sequence, position)."""
    from surgery.planning.plan import make_plan
    from surgery.recovery.options import Refit, plan_recovery
    from surgery.recovery.tokens import with_tokens

    options = RecoveryOptions(
        "lstsq",
        recover_text=tuple(arguments.calib) if arguments.recover_tokens else (),
        **({"recover_tokens": arguments.recover_tokens} if arguments.recover_tokens else {}),
    )
    recovery = plan_recovery(options, atlas, make_plan(atlas, plan_options(arguments, arguments.scores)))
    assert isinstance(recovery, Refit)
    tokens = with_tokens(recovery, source).tokens
    assert tokens is not None
    return tokens


def in_memory(
    arguments: argparse.Namespace, name: str, atlas: Atlas, source: Any, tokens: np.ndarray | None
) -> tuple[Any, dict[str, Any]]:
    """The loaded model after the cut and the recovery ``name``, and what the recovery cost."""
    import recovery_baselines as baselines

    from chanfmt.models.load import load_model
    from surgery.cut.source import check_fingerprint
    from surgery.evaluation.memory import PeakMemory
    from surgery.planning.plan import make_plan

    check_fingerprint(atlas.model, source)
    model = load_model(source, device="cpu")
    if name == "dense":
        return model, {}
    plan = make_plan(atlas, plan_options(arguments, name if name in METHODS else arguments.scores))
    if tokens is None:
        baselines.cut_only(model, plan)
        return model, {}
    memory, start, worked = PeakMemory(model), time.monotonic(), time.process_time()
    if rule := baselines.find_rule(name):
        baselines.fit(model, plan, tokens, rule)
    else:
        baselines.flap_bias(model, plan, tokens)
    return model, {
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - worked,
        "peak_bytes": memory.bytes(),
        "rule": None if rule is None else {key: value for key, value in vars(rule).items() if key != "source"},
    }


def plan_options(arguments: argparse.Namespace, scores: str) -> PlanOptions:
    return PlanOptions(arguments.sparsity, scores, seed=arguments.seed)


def machine() -> dict[str, Any]:
    """CPU, threads and versions."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "chanfmt": chanfmt.__version__,
    }


# The page.


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    from recovery_baselines import FLAP, RULES

    identity = results["identity"]
    rows = {name: row for name, row in results["rows"].items() if "error" not in row}
    failed = {name: row["error"] for name, row in results["rows"].items() if "error" in row}
    if not rows:
        return "No row was measured.\n"
    sections = [heading(identity, rows)]
    for number, first in enumerate(next(iter(rows.values()))["texts"]):
        sections.append(f"## {first['text']}\n\n{losses_table(identity, rows, number)}")
    sections.append(f"## Cost\n\n{costs_table(rows)}")
    notes = [
        "`bias` is our `--recover bias`, with means over the atlas's tokens; `flap-bias` is the same method written anew, with means "
        f"over the tokens of the refit. {FLAP}.",
        "`flap` is FLAP's bias on the channels that FLAP's scores keep, the same share of every layer.",
        *(f"`{name}` is {rule.source}." for name, rule in RULES.items()),
        "A number behind a colon is another penalty than the default.",
    ]
    sections.append("## Rows\n\n" + "\n".join(f"- {note}" for note in notes))
    if failed:
        sections.append("## Not measured\n\n" + "\n".join(f"- `{name}`: {error}" for name, error in failed.items()))
    return "\n\n".join(sections) + "\n"


def heading(identity: dict[str, Any], rows: dict[str, Any]) -> str:
    atlas = identity["atlas"]
    dates = sorted(row["date"][:10] for row in rows.values())
    machines = list(dict.fromkeys(json.dumps(row["machine"]) for row in rows.values()))
    refit = next((row["refit_tokens"] for row in rows.values() if "refit_tokens" in row), None)
    where = f"drawn from {', '.join(Path(source).name for source in identity['calib'])}" if identity["calib"] else "of the atlas"
    lines = [
        f"# Recovery of {identity['model']}",
        f"Every FFN lost {identity['sparsity']:.0%} of its channels, chosen by {identity['scores']} from {atlas['tokens']} tokens of "
        f"{', '.join(atlas['sources'])} (seed {identity['seed']}), unless the row says otherwise."
        + (f" The refits use {refit:,} tokens {where}." if refit else ""),
    ]
    learned = {Path(source.partition("=")[0]).name for source in identity["calib"] or atlas["sources"]}
    lines += [
        f"**The refit uses {Path(text).name} too, so {Path(text).name} is not another domain here.**"
        for text, _ in identity["texts"]
        if Path(text).name in learned
    ]
    lines.append(f"Measured on {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.")
    for item in map(json.loads, machines):
        lines.append(
            f"{item['cpu']}, {item['cores']} cores, {item['threads']} threads; torch {item['torch']}, transformers "
            f"{item['transformers']}, chanfmt {item['chanfmt']}."
        )
    lines += [f"    {command}" for command in dict.fromkeys(row["command"] for row in rows.values())]
    return "\n\n".join(lines)


def losses_table(identity: dict[str, Any], rows: dict[str, Any], number: int) -> str:
    """Losses on one text, the best row last but the dense model first, and intervals of the difference from each of ours."""
    from surgery.evaluation.perplexity import BlockLosses, paired_bootstrap

    found = {
        name: BlockLosses(np.array(row["texts"][number]["block_nll"]), np.array(row["texts"][number]["block_predicted"]))
        for name, row in rows.items()
    }
    unrecovered = [losses.mean for name, losses in found.items() if name in METHODS and name != "flap"]
    best = min(unrecovered, default=math.nan)
    ours = [name for name in OURS if name in found]
    text = next(iter(rows.values()))["texts"][number]
    blocks = len(text["block_nll"])
    lines = [
        f"{text['tokens']:,} tokens in {blocks} block{'' if blocks == 1 else 's'} of {identity['seq_len']:,}. *Share* is the "
        "perplexity divided by the lowest one without recovery. *Above* is the difference in nats per token, with the 95% interval of "
        "a paired bootstrap over the blocks; a positive one means that ours is better.",
        "",
        "| row | perplexity | nats/token | share |" + "".join(f" above {name} |" for name in ours),
        "|---|---:|---:|---:|" + "---:|" * len(ours),
    ]
    for name in sorted(found, key=lambda name: (name != "dense", found[name].mean)):
        losses = found[name]
        cells = [label(name), f"{losses.perplexity:.4g}", f"{losses.mean:.4f} +- {losses.standard_error:.4f}"]
        cells.append("-" if math.isnan(best) else f"{math.exp(losses.mean - best):.3f}")
        for reference in ours:
            gap = paired_bootstrap(found[reference], losses, seed=identity["seed"])
            cells.append("-" if name == reference else f"{gap.difference:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_table(rows: dict[str, Any]) -> str:
    """Seconds and peak memory of the recoveries."""
    lines = [
        "Seconds, seconds of all cores together, and peak memory of each recovery alone, in a process of its own. Ours stream the model from its files, and include "
        "reading, cutting, writing and checking the checkpoint. The others run on a model that is in memory: the reading is not in "
        "their seconds, and all weights are in their memory.",
        "",
        "| row | seconds | CPU seconds | peak memory, MB | parameters |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        more = " + interrupted runs" if row.get("continued") else ""
        times = [f"{row[key]:,.0f}{more}" if key in row else "-" for key in ("seconds", "cpu_seconds")]
        peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row.get("peak_bytes") else "-"
        lines.append(f"| {label(name)} | {' | '.join(times)} | {peak} | {row['parameters']:,} |")
    return "\n".join(lines)


def label(name: str) -> str:
    if name in ("dense", "flap"):
        return name
    return f"{name} scores, no recovery" if name in METHODS else f"**{name}**" if name in OURS else name


if __name__ == "__main__":
    sys.exit(main())
