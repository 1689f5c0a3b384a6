"""Random SIGKILLs over everything that writes an atlas: ``python -m tests.support.crash.run --kills 200``."""

from __future__ import annotations

import os

# Threads do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chanfmt.building.options import BuildOptions
from chanfmt.cli.framework import print_json
from chanfmt.cli.main import main as atlas
from chanfmt.format.records import LabelSettings
from chanfmt.format.writer import write_atlas
from tests.support.builds import build
from tests.support.crash.harness import Job, kill_randomly
from tests.support.factory import random_content, with_other_tokens
from tests.support.tiny import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable


def rewrite_job() -> Job:
    """`write_atlas` over an existing atlas."""
    old, new = (random_content(layers=6, channels=4000, seed=seed) for seed in (0, 1))

    def run(place: Path) -> None:
        write_atlas(new, place / "a.h5")

    return Job("rewrite", lambda place: write_atlas(old, place / "a.h5"), run, run)


def command_job(name: str, start: Callable[[Path], object], arguments: Callable[[Path], list[object]]) -> Job:
    """An `atlas` command that may be repeated as it is."""

    def run(place: Path) -> None:
        code = atlas([name, *map(str, arguments(place))])
        if code:
            raise SystemExit(code)

    return Job(name, start, run, run)


def label_job() -> Job:
    """`atlas label` over its own input."""
    content = random_content(layers=6, channels=4000)
    return command_job(
        "label", lambda place: write_atlas(content, place / "a.h5"), lambda place: [place / "a.h5", "--rho", 0.02, "--overwrite"]
    )


def merge_job() -> Job:
    """`atlas merge` of two atlases of one model over an older output."""
    first = random_content(layers=6, channels=4000)
    second = with_other_tokens(first)

    def start(place: Path) -> None:
        for name, content in (("p.h5", first), ("q.h5", second), ("a.h5", first)):
            write_atlas(content, place / name)

    return command_job("merge", start, lambda place: [place / "p.h5", place / "q.h5", "-o", place / "a.h5", "--overwrite"])


def build_job(model: Path) -> Job:
    """A build over an existing atlas, with a partial atlas after every batch, continued with ``--resume``."""
    old = random_content()

    def run(place: Path, *, resume: bool = False) -> None:
        options = BuildOptions(
            str(model),
            str(place / "a.h5"),
            calib=str(model / "text.txt"),
            sequences=12,
            seq_len=48,
            batch_size="2",
            checkpoint_every=0,
            overwrite=True,
            resume=resume,
        )
        build(options, LabelSettings(rho=0.03, support_size=8))

    return Job("build", lambda place: write_atlas(old, place / "a.h5"), run, lambda place: run(place, resume=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills of every job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="of rewrite, label, merge and build; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="crash-"))
    model = save_tiny(directory / "model", "llama")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=generator)
    (model / "text.txt").write_text("".join(map(chr, letters.tolist())))
    result = {}
    for job in (rewrite_job(), label_job(), merge_job(), build_job(model)):
        if arguments.jobs and job.name not in arguments.jobs:
            continue
        place = directory / job.name
        place.mkdir()
        started = time.monotonic()
        tally = kill_randomly(job, place, arguments.kills, arguments.seed)
        result[job.name] = dict(tally) | {"seconds": round(time.monotonic() - started, 1)}
    shutil.rmtree(directory)
    print_json(result)


if __name__ == "__main__":
    main()
