"""What chanfmt does on a GPU, in one run: see README.md in this directory.

    python -m bench.gpu [--device cuda] [--scale full] [--limit 1800] [--only large,small] [--output bench/results]

`DEVICE` and `SCALE` in the environment give the defaults. On a CPU, --device cpu --scale tiny tries the bench itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.items import MARK

STEPS = {"machine": 120, "large": 600, "limit": 400, "four": 300, "small": 400, "group": 300}
"""Steps in order, each with the most seconds that it may take. `limit` needs the checkpoint that `large` writes."""
BYTES = {"full": 36e9, "tiny": 1e9}
"""Room that the checkpoints, cuts and atlases take, by scale."""
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=os.environ.get("DEVICE", "cuda"))
    parser.add_argument("--scale", default=os.environ.get("SCALE", "full"), choices=sorted(BYTES))
    parser.add_argument("--limit", type=float, default=1800, help="seconds in all; the steps that remain are left out")
    parser.add_argument("--only", default=",".join(STEPS), help="steps to run, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results", help="directory of the results")
    options = parser.parse_args()
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(STEPS))
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; choose from {', '.join(STEPS)}")
    began, items = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="chanfmt-gpu-", dir=roomy(BYTES[options.scale])) as work:
        for step, most in STEPS.items():
            if step not in wanted:
                continue
            left = options.limit - (time.monotonic() - began)
            found = run(step, min(most, left), work, options) if left > 5 else [failed(step, "not run: no time left")]
            for line in found:
                print(row(line), flush=True)
            items += found
    write(options, items, time.monotonic() - began)
    sys.exit(0 if all(line["ok"] for line in items) else 1)


def roomy(needed: float) -> str:
    """A directory with ``needed`` bytes free: in memory if there is room for twice as much, because that is faster."""
    for place, share in (("/dev/shm", 2), (tempfile.gettempdir(), 1), (str(ROOT), 1)):
        if os.path.isdir(place) and shutil.disk_usage(place).free > share * needed:
            return place
    sys.exit(f"the bench needs {needed / 1e9:.0f} GB of disk; set TMPDIR to a directory with more room, or use --scale tiny")


def run(step: str, most: float, work: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The items of ``step``, which runs in a process of its own for at most ``most`` seconds."""
    environment = os.environ | {
        "DEVICE": options.device,
        "SCALE": options.scale,
        "BENCH_WORK": work,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    print(f"{step} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", f"bench.gpu.{step}"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
        ) as process:
            try:
                code: int | str = process.wait(most)
            except subprocess.TimeoutExpired:
                code = f"stopped after {most:.0f} s"
            finally:
                # Ctrl-C does not reach another session. torchrun's processes are in the session too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        found = [json.loads(line.removeprefix(MARK)) for line in output if line.startswith(MARK)]
        if code:
            last = " ".join(errors.read().strip().splitlines()[-1:])
            found.append(failed(step, f"the process ended early ({code}): {last[:300]}"))
    return found


def failed(step: str, why: str) -> dict[str, Any]:
    return {"name": step, "ok": False, "seconds": 0.0, "error": why}


def row(line: dict[str, Any]) -> str:
    """One line of the table. Tables within an item are in the JSON file only."""
    shown = {key: value for key, value in line.items() if key not in ("name", "ok", "seconds", "at", "batches", "steps", "code")}
    values = " ".join(f"{key}={text(value)}" for key, value in shown.items() if value not in (None, [], {}))
    lines = [f"{'ok' if line['ok'] else 'FAIL':<4}  {line['name']:<52} {line['seconds']:8.1f} s  {values}"]
    for name, entry in line.get("steps", {}).items():
        memory = f"  peak {entry['peak_gb']:.2f} GB" if "peak_gb" in entry else ""
        lines.append(f"        {name:<50} {entry['seconds']:8.2f} s{memory}")
    return "\n".join(lines)


def text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def write(options: argparse.Namespace, items: list[dict[str, Any]], seconds: float) -> None:
    """Write the items as a JSON file and as a table, under the date and the name of the machine."""
    machine = next((line["machine"] for line in items if "machine" in line), options.device)
    date = datetime.date.today().isoformat()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    label = re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")
    stem = options.output / f"gpu-{date}-{label}{'-tiny' if options.scale == 'tiny' else ''}"
    options.output.mkdir(parents=True, exist_ok=True)
    head = {"date": date, "machine": machine, "device": options.device, "scale": options.scale, "commit": commit}
    head["seconds"] = round(seconds, 1)
    stem.with_suffix(".json").write_text(json.dumps({**head, "items": items}, indent=1) + "\n")
    title = f"python -m bench.gpu --device {options.device} --scale {options.scale}: {machine}, {date}, commit {commit}, {seconds:.0f} s"
    stem.with_suffix(".txt").write_text("\n".join([title, "", *map(row, items)]) + "\n")
    print(f"wrote {stem}.json and {stem}.txt", file=sys.stderr)


if __name__ == "__main__":
    main()
