"""Kill writers at random moments, and look at the files that are left.

Children are forked from a process that has imported everything, so a kill wastes only the work that it interrupts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chanfmt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Job:
    """Something that writes an atlas and may be killed.

    Attributes:
        start: Put inputs, and an older output, into an empty directory.
        run: What is killed; called in a child process with the directory.
        again: What a user does after a kill; the same as ``run``, or with ``--resume``.
        output: Name of the atlas in the directory.
        checkpoint: Name of the partial atlas that may lie beside it.
    """

    name: str
    start: Callable[[Path], object]
    run: Callable[[Path], object]
    again: Callable[[Path], object]
    output: str = "a.h5"
    checkpoint: str = "a.h5.partial"


def same(first: Any, second: Any) -> bool:
    """Whether two atlas contents agree bit for bit, except for times and commands."""
    plain = ("title", "model", "labels", "core_rho", "blocks", "status", "dropped")
    if any(getattr(first, name) != getattr(second, name) for name in plain):
        return False
    for field in dataclasses.fields(first.calibration):
        ours, theirs = getattr(first.calibration, field.name), getattr(second.calibration, field.name)
        if (ours.tobytes() != theirs.tobytes()) if hasattr(ours, "tobytes") else ours != theirs:
            return False
    return len(first.stacks) == len(second.stacks) and all(
        list(a.variables) == list(b.variables)
        and all(a.variables[name].tobytes() == b.variables[name].tobytes() for name in a.variables)
        for a, b in zip(first.stacks, second.stacks, strict=True)
    )


def content(path: Path) -> Any:
    """Everything in ``path``, its digest checked."""
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.content()


def child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process, without its stdout. Returns its id; it exits with 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def finish(work: Callable[[], object]) -> float:
    """Run ``work`` in a forked process to its end. Returns its seconds; raises `AssertionError` if it fails."""
    started = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
    assert code == 0, f"a run that nobody killed exited with {code}"
    return time.monotonic() - started


def kill_randomly(job: Job, directory: Path, kills: int, seed: int) -> Counter[str]:
    """Kill ``job`` ``kills`` times; after each, check what is left and let it be done again to its end.

    Half of the continued runs are killed once more. Returns what was seen, by name.

    Raises:
        AssertionError: An output that is neither the old one nor the new one, a checkpoint that does not
            open, a file that nobody asked for, or an end that differs from the uninterrupted one.
    """
    chance = random.Random(seed)
    whole = directory / "whole"
    whole.mkdir()
    job.start(whole)
    old = content(whole / job.output)
    inputs = {item.name for item in whole.iterdir()}
    seconds = finish(lambda: job.run(whole))
    new = content(whole / job.output)
    assert not same(old, new), f"{job.name}: the test cannot tell old from new"
    tally: Counter[str] = Counter()
    number = 0
    while tally["kills"] < kills:
        place = directory / f"{job.name}-{number}"
        number += 1
        place.mkdir()
        job.start(place)
        work = job.run
        while True:
            pid = child(lambda work=work, place=place: work(place))
            time.sleep(chance.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code in (0, -signal.SIGKILL), f"{job.name} exited with {code}"
            tally["finished before the kill" if code == 0 else "kills"] += 1
            # The machine's other work comes and goes: about one run in four should reach its end.
            seconds *= 0.91 if code == 0 else 1.03
            _check(job, place, inputs, old, new, tally)
            if code == 0 or chance.random() < 0.5 or tally["kills"] >= kills:
                break
            work = job.again
        finish(lambda place=place: job.again(place))
        assert same(content(place / job.output), new), f"{job.name}: done again, it ends differently ({place})"
        left = {item.name for item in place.iterdir()}
        assert left == inputs, f"{job.name}: left behind: {sorted(left - inputs)}"
        tally["ended equal"] += 1
        shutil.rmtree(place)
    return tally


def _check(job: Job, place: Path, inputs: set[str], old: Any, new: Any, tally: Counter[str]) -> None:
    found = content(place / job.output)
    is_new = same(found, new)
    assert is_new or same(found, old), f"{job.name}: the output is neither the old one nor the new one ({place})"
    tally["output new" if is_new else "output old"] += 1
    for item in place.iterdir():
        if item.name in inputs:
            continue
        if item.name == job.checkpoint:
            assert content(item).status == "partial"
            tally["checkpoint there"] += 1
        elif item.match(".*.claim"):
            tally["claim there"] += 1
        else:
            assert item.match(".*.tmp"), f"{job.name}: {item.name} is left over"
            tally["temporary there"] += 1
