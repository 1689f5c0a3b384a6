"""What is left of a model at half its FFN channels: every method, and what recovery gives back.

    python bench/half.py MODEL ATLAS TEXT [--methods M,M,...] [--refitted M,M,...] [--held-out pydoc] -o DIR

ATLAS is of MODEL, on text of the kind of TEXT. Runs ``surgery sweep`` at sparsity 0.5 on TEXT for every method
without recovery, for ``flap`` with its bias, and for some with least squares; these with and without on the
held-out text too, from which nothing was calibrated. Rows that are in DIR are not measured again. Prints a
page in Markdown.
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
    print(f"# Half the channels\n\n`python bench/half.py`, {today}. {origin(arguments.atlas)}")
    for text, tokens, runs in (
        (arguments.text, arguments.max_tokens, ((arguments.methods, "none"), ("flap", "bias"), (arguments.refitted, "lstsq"))),
        (arguments.held_out, arguments.held_out_tokens, ((arguments.refitted, "none"), (arguments.refitted, "lstsq"))),
    ):
        name = Path(text).stem
        for methods, recover in runs:
            found = sweep(arguments, text, tokens, methods, recover, arguments.output / name)
        print(f"\n## {name}\n\n{page(found)}", flush=True)


def origin(path: str) -> str:
    """What the scores come from."""
    with chanfmt.open(path) as atlas:
        record = atlas.calibration
        sources = ", ".join(dict.fromkeys(Path(item.source).name for item in record.contributions))
        return (
            f"{atlas.model.id}, {SPARSITY} of every FFN removed; scores and refits from {record.sequences} x "
            f"{record.seq_len} tokens of {sources} (seed {record.seed}); `random` with seed 0."
        )


def sweep(arguments: argparse.Namespace, text: str, tokens: int, methods: str, recover: str, output: Path) -> dict[str, Any]:
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
    """The rows, the best cut first."""
    identity = results["identity"]
    dense, *rows = sorted(results["rows"], key=lambda row: (row["method"] != "dense", row["nll"]))
    best = min(row["perplexity"] for row in rows if row["recover"] == "none")
    lines = [
        f"{identity['tokens']:,} tokens in blocks of {identity['seq_len']:,}, {identity['dtype']}; "
        f"dense: {dense['perplexity']:.2f}.",
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
