"""Random SIGKILLs over everything that writes an atlas: ``python -m tests.crash.run --kills 200``."""

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

import torch

from chanfmt.console import print_json
from chanfmt.produce.build import build
from chanfmt.produce.options import BuildOptions
from chanfmt.records import LabelSettings
from chanfmt.writer import write_atlas
from tests.crash.harness import Job, kill_randomly
from tests.factory import random_content
from tests.tiny import save_tiny


def rewrite_job() -> Job:
    """`write_atlas` over an existing atlas."""
    old, new = (random_content(layers=6, channels=4000, seed=seed) for seed in (0, 1))

    def run(place: Path) -> None:
        write_atlas(new, place / "a.h5")

    return Job("rewrite", lambda place: write_atlas(old, place / "a.h5"), run, run)


def build_job(model: Path) -> Job:
    """A build over an existing atlas, with a checkpoint after every batch, continued with ``--resume``."""
    old = random_content()

    def run(place: Path, *, resume: bool = False) -> None:
        options = BuildOptions(str(model), str(place / "a.h5"), calib=str(model / "text.txt"), sequences=12, seq_len=48,
                               batch_size="2", checkpoint_every=0, overwrite=True, resume=resume)
        build(options, LabelSettings(rho=0.03, support_size=8))

    return Job("build", lambda place: write_atlas(old, place / "a.h5"), run, lambda place: run(place, resume=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills of every job")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="crash-"))
    model = save_tiny(directory / "model", "llama")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=generator)
    (model / "text.txt").write_text("".join(map(chr, letters.tolist())))
    result = {}
    for job in (rewrite_job(), build_job(model)):
        place = directory / job.name
        place.mkdir()
        started = time.monotonic()
        tally = kill_randomly(job, place, arguments.kills, arguments.seed)
        result[job.name] = dict(tally) | {"seconds": round(time.monotonic() - started, 1)}
    shutil.rmtree(directory)
    print_json(result)


if __name__ == "__main__":
    main()
