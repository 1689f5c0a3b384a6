"""Every system call of a small output interrupted in turn: the target is the old one or the new one, never a third thing."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import chanfmt
from chanfmt.algebra.export import export
from chanfmt.format.reader import Atlas
from chanfmt.models.source import ModelSource
from chanfmt.reporting import pages
from chanfmt.reporting.make import make_report
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.planning.file import load_plan, save_plan
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.result.evaluated import Evaluated, Measured
from surgery.result.push import _write_card
from surgery.result.result import check_unchanged, open_result
from tests.support.crash.trace import CALLS, FAILED, STRACE, calls_of, trace
from tests.support.cut_models import save_atlas, save_model
from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(STRACE is None or sys.platform != "linux", reason="needs strace, which only Linux has"),
    pytest.mark.slow,
]


@dataclass(frozen=True)
class Job:
    """Something that replaces outputs.

    Attributes:
        targets: Names of the files or directories that are replaced, each whole or not at all.
        start: Puts the old ones into an empty directory.
        run: Replaces them.
        look: Makes something comparable of a target.
    """

    targets: tuple[str, ...]
    start: Callable[[Path], object]
    run: Callable[[Path], object]
    look: Callable[[Path], object]


def bytes_of(target: Path) -> dict[str, bytes] | None:
    """Everything in a file or a directory; None if there is none."""
    if not target.exists():
        return None
    items = [target] if target.is_file() else sorted(target.rglob("*"))
    return {str(item.relative_to(target)): item.read_bytes() for item in items if item.is_file()}


def channels_of(target: Path) -> list[list[int]]:
    """The channels that a plan keeps. The order of keys in a plan's header differs from run to run."""
    return [block.kept.tolist() for block in load_plan(target).blocks]


def weights_of(target: Path) -> dict[str, object]:
    """Names and weights of a result, which must be as a whole what its record says."""
    check_unchanged(open_result(target))
    found = bytes_of(target)
    return {name: data if name.startswith("model") else None for name, data in found.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its atlas, and two plans."""
    home = tmp_path_factory.mktemp("made")
    model = save_model("llama", home / "model")
    atlas = save_atlas("llama", model, home / "atlas.h5")
    with Atlas.open(atlas) as opened:
        plans = [make_plan(opened, PlanOptions(sparsity)) for sparsity in (0.25, 0.5)]
        apply_plan(plans[0], ModelSource(model), home / "cut", CutOptions(verify=False), atlas=opened)
    for name, seed in (("a.h5", 0), ("b.h5", 1)):
        random_atlas(home / name, layers=2, channels=24, seed=seed)
    return home, plans


def export_job(home, suffix) -> Job:
    target = f"table{suffix}"

    def write(place, name):
        with chanfmt.open(home / name) as atlas:
            export(atlas, place / target, metrics=["lp"], overwrite=True)

    return Job((target,), lambda place: write(place, "a.h5"), lambda place: write(place, "b.h5"), bytes_of)


def plan_job(plans) -> Job:
    first, second = (functools.partial(lambda plan, place: save_plan(plan, place / "plan"), plan) for plan in plans)
    return Job(("plan",), first, second, channels_of)


def report_job(home, monkeypatch) -> Job:
    # Figures are drawn once: drawing takes most of the time, and no calls that matter here.
    monkeypatch.setattr(pages, "render", functools.lru_cache(lambda plot, kind: f"{plot.name} {kind}".encode()))
    reports = []
    for name in ("a.h5", "b.h5"):
        with chanfmt.open(home / name) as atlas:
            report = make_report(atlas)
            reports.append(dataclasses.replace(report, sections=report.sections[:1]))

    def write(place, number):
        pages.write_report(reports[number], place / "report", overwrite=True)

    return Job(("report",), lambda place: write(place, 0), lambda place: write(place, 1), bytes_of)


def prune_job(home, plans) -> Job:
    def write(place, number):
        with Atlas.open(home / "atlas.h5") as atlas:
            options = CutOptions(overwrite=True, verify=False)
            apply_plan(plans[number], ModelSource(home / "model"), place / "cut", options, atlas=atlas)

    return Job(("cut",), lambda place: write(place, 0), lambda place: write(place, 1), weights_of)


def push_job(home) -> Job:
    """What `surgery push` writes here: the card and the numbers in it. On the Hub, a commit is whole or not there."""
    measured = Measured("0" * 64, 64, 62, 2, "0" * 64, 2.5, 0.1, 12.2, 1.0, ())
    numbers = Evaluated("wikitext2", 32, "blocks", "perplexity of blocks", measured, None)

    def write(place):
        _write_card(open_result(place / "cut"), "ann/renamed", numbers, new=True)

    start = functools.partial(lambda place: shutil.copytree(home / "cut", place / "cut"))
    return Job(("cut/README.md", "cut/evaluation.json"), start, write, bytes_of)


@pytest.fixture(params=["csv", "npz", "plan", "report", "prune", "push"])
def job(request, made, monkeypatch):
    home, plans = made
    return {
        "csv": lambda: export_job(home, ".csv"),
        "npz": lambda: export_job(home, ".npz"),
        "plan": lambda: plan_job(plans),
        "report": lambda: report_job(home, monkeypatch),
        "prune": lambda: prune_job(home, plans),
        "push": lambda: push_job(home),
    }[request.param]()


class Place:
    """A directory in which a job runs again and again from its start."""

    def __init__(self, job: Job, home: Path) -> None:
        self.job, self.directory, self._log = job, home / "d", home / "trace"
        self.directory.mkdir()
        job.start(self.directory)
        shutil.copytree(self.directory, home / "old")
        self._home = home
        self._old = self._found()
        job.run(self.directory)
        self.new = self._found()
        assert all(self._old[name] != self.new[name] for name in job.targets), "the test cannot tell old from new"
        self._names = self.names()

    def names(self) -> set[str]:
        return {str(item.relative_to(self.directory)) for item in self.directory.rglob("*")}

    def traced(self, *options: str) -> tuple[int, str]:
        """Run the job from its start. Returns exit code and trace."""
        shutil.rmtree(self.directory)
        shutil.copytree(self._home / "old", self.directory)
        return trace(lambda: self.job.run(self.directory), self._log, options)

    def states(self) -> list[str]:
        """``old`` or ``new`` of each target; anything else fails."""
        there = self._found()
        states = []
        for name in self.job.targets:
            assert there[name] in (self._old[name], self.new[name]), name
            states.append("new" if there[name] == self.new[name] else "old")
        return states

    def check_again(self) -> None:
        """The next run ends with the new outputs, and removes what was left."""
        self.job.run(self.directory)
        assert set(self.states()) == {"new"}
        assert self.names() == self._names

    def _found(self):
        return {name: self.job.look(self.directory / name) for name in self.job.targets}


def test_killed_at_every_call(job, tmp_path):
    place = Place(job, tmp_path)
    code, log = place.traced("-e", f"trace={','.join(CALLS)}")
    assert code == 0
    assert set(place.states()) == {"new"}
    calls = calls_of(log)
    outcomes = []
    for index, name in enumerate(calls):
        nth = calls[: index + 1].count(name)
        code, _ = place.traced("-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={nth}")
        assert code == -9, (index, name)
        states = place.states()
        outcomes.append(sum(state == "new" for state in states))
        place.check_again()
    assert outcomes == sorted(outcomes), "old up to one call, new from there on"
    assert (outcomes[0], outcomes[-1]) == (0, len(job.targets))


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_every_call_failing(job, tmp_path, error):
    place = Place(job, tmp_path)
    code, log = place.traced("-e", f"trace={','.join(CALLS)}")
    calls = calls_of(log)
    for name in sorted({"write", "fsync", "rename", "renameat2", "mkdir"} & set(calls)):
        # What one error shows at every call, the other shows at every second call.
        for nth in range(1, calls.count(name) + 1, 1 if error == "ENOSPC" else 2):
            code, _ = place.traced("-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={nth}")
            assert code in (0, FAILED), f"{name} {nth}: a write that fails must say so in our words"
            states = place.states()
            if code == 0:
                assert set(states) == {"new"}, (name, nth)
            assert place.names() <= place._names | set(job.targets), (name, nth)
