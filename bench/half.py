"""Measure a model with half of its FFN channels: every method, and what recovery gains.

    python bench/half.py MODEL ATLAS TEXT [--methods M,M,...] [--refitted M,M,...] [--held-out pydoc] -o DIR

ATLAS is the atlas of MODEL, measured on text of the same kind as TEXT. The script runs ``surgery sweep`` at sparsity 0.5
on TEXT: for every method without recovery, for ``flap`` with its bias, and for the --refitted methods with least squares.
The --refitted methods also run, with and without recovery, on the held-out text, which was not used for calibration.
Rows that DIR already has are not measured again. The script prints a page in Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chanfmt
from surgery.planning.methods import METHODS

SPARSITY = "0.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("atlas")
    parser.add_argument("text")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--refitted", default="scar-lp,wanda,activation")
    parser.add_argument("--held-out", default="pydoc")
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(exist_ok=True)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    print(f"# Half the channels\n\n`python bench/half.py` printed these tables on {today}. {origin(arguments.atlas)}")
    for text, tokens, runs in (
        (arguments.text, arguments.max_tokens, ((arguments.methods, "none"), ("flap", "bias"), (arguments.refitted, "lstsq"))),
        (arguments.held_out, arguments.held_out_tokens, ((arguments.refitted, "none"), (arguments.refitted, "lstsq"))),
    ):
        name = Path(text).stem
        for methods, recover in runs:
            found = sweep(arguments, text, tokens, methods, recover, arguments.output / name)
        print(f"\n## {name}\n\n{page(found)}", flush=True)


def origin(path: str) -> str:
    """Sentences that say what was removed, and what the scores come from."""
    with chanfmt.open(path) as atlas:
        record = atlas.calibration
        sources = ", ".join(dict.fromkeys(Path(item.source).name for item in record.contributions))
        return (
            f"Half of every FFN of {atlas.model.id} was removed (sparsity {SPARSITY}). Scores and refits come from "
            f"{record.sequences} x {record.seq_len} tokens of {sources} (seed {record.seed}). The method `random` uses seed 0."
        )


def sweep(arguments: argparse.Namespace, text: str, tokens: int, methods: str, recover: str, output: Path) -> dict[str, Any]:
    """Run ``surgery sweep`` in a process of its own. Returns the content of its results file."""
    command = [
        sys.executable,
        "-m",
        "surgery.cli.main",
        "sweep",
        arguments.atlas,
        "--model",
        arguments.model,
        "--methods",
        methods,
        "--sparsity",
        SPARSITY,
        "--recover",
        recover,
        "--data",
        text,
        "--max-tokens",
        str(tokens),
        "-o",
        str(output),
    ]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((output / "results.json").read_text())
    return result


def page(results: dict[str, Any]) -> str:
    """The rows as a Markdown table, the best cut first."""
    identity = results["identity"]
    dense, *rows = sorted(results["rows"], key=lambda row: (row["method"] != "dense", row["nll"]))
    best = min(row["perplexity"] for row in rows if row["recover"] == "none")
    lines = [
        f"The text is {identity['tokens']:,} tokens in sequences of {identity['seq_len']:,}, measured in {identity['dtype']}. "
        f"The dense model reaches {dense['perplexity']:.2f}.",
        "",
        "| method | recovery | perplexity | nats/token | of the best without recovery | supernodes removed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['method']} | {row['recover']} | {row['perplexity']:.4g} | {row['nll']:.4f} +- {row['standard_error']:.4f} "
        f"| {row['perplexity'] / best:.3g} | {row['hit_rate']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
