"""A distillation in several processes: the result of one process to rounding, one writer, and one end for all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery.distillation import run as distillation
from surgery.recovery.distillation.state_file import StateFile
from surgery.recovery.options import Refit
from surgery.recovery.processes import run_command
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated
from tests.support.tiny import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of four sequences, computed in float32."""
    monkeypatch.setattr(distillation, "STEP_TOKENS", 80)
    monkeypatch.setattr(distillation, "descent_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama") / "model"
    zoo.tiny("llama", "causal").save_pretrained(directory)
    return directory


def cut(model: Path, output: Path, **changes: Any) -> Any:
    """Cut ``model`` as a command does, in this process of perhaps several."""
    ids = np.random.default_rng(3).integers(0, 90, (22, 20)).astype(np.int32)
    given = Refit(ids, "cpu", **{"spool_bytes": 1 << 30, "method": "distill", "start": "lstsq"} | changes)
    plan = planned(model, lambda number, ffn: ffn.width // 2)
    return apply_plan(plan, ModelSource(model), output, CutOptions(allow_padding=True), recovery=given)


def in_processes(count: int, work: Callable[[int], object]) -> list[int | None]:
    """Exit codes of ``count`` processes that run ``work`` with their rank, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = multiprocessing.get_context("fork")
    children = [kind.Process(target=_child, args=(rank, count, port, work)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def _child(rank: int, count: int, port: int, work: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        code = run_command(lambda: work(rank))  # type: ignore[arg-type, return-value]
    except ChanfmtError as error:
        print(error.message, file=sys.stderr)
        code = error.exit_code
    finally:
        # Nothing of pytest should run at the end of this process.
        os._exit(code)


@pytest.fixture(scope="module")
def pair(model: Path) -> Path:
    """The result of two processes, which also left what they had to leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "STEP_TOKENS", 80)
        patch.setattr(distillation, "descent_dtype", lambda device: torch.float32)
        assert in_processes(2, lambda rank: cut(model, model.parent / "pair")) == [0, 0]
    assert {path.name for path in model.parent.iterdir()} == {"model", "pair"}
    return model.parent / "pair"


@pytest.mark.parametrize("count", [2, *repeated(3)])
def test_several_processes_do_what_one_does(model: Path, pair: Path, tmp_path: Path, count: int) -> None:
    alone = cut(model, tmp_path / "alone").recovery.distillation
    assert alone.step > 0
    if count > 2:
        assert in_processes(count, lambda rank: cut(model, tmp_path / "out")) == [0] * count
        pair = tmp_path / "out"
    cut(model, tmp_path / "start", method="lstsq")
    start, expected, found = (read(place) for place in (tmp_path / "start", tmp_path / "alone", pair))
    changed = [name for name in expected if not torch.equal(start[name], expected[name])]
    assert changed
    for name in expected:
        # Adam divides by the size of the gradient, so the rounding of a small one shows. It is small beside a step.
        moved = (expected[name] - start[name]).norm()
        assert (found[name] - expected[name]).norm() <= 1e-3 * moved, name


@pytest.mark.repeated
def test_a_killed_distillation_goes_on_in_all_processes(model: Path, pair: Path, tmp_path: Path) -> None:
    def die(rank: int) -> None:
        whole, saves = StateFile.save, []

        def save(self: StateFile, *args: Any) -> None:
            whole(self, *args)
            saves.append(None)
            if len(saves) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        StateFile.save = save  # type: ignore[method-assign]
        cut(model, tmp_path / "out", save_every=0.0)

    def resume(rank: int) -> None:
        distillation.refitted = None  # type: ignore[assignment]
        cut(model, tmp_path / "out", save_every=0.0)

    assert in_processes(2, die) == [-signal.SIGKILL, 1]
    assert not (tmp_path / "out").exists()
    assert in_processes(2, resume) == [0, 0]
    expected, found = read(pair), read(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_error_in_one_process_ends_all_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(distillation, "differentiate", lambda *args: 1 / 0)
        cut(model, tmp_path / "out")

    assert in_processes(2, fail)[0] == 1
    assert "rank 1 failed: ZeroDivisionError" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    # A step of one sequence cannot be shared.
    monkeypatch.setattr(distillation, "STEP_TOKENS", 20)
    assert in_processes(2, lambda rank: cut(model, tmp_path / "out")) == [2, 2]
    assert "2 processes cannot share a step of the distillation, which takes 1 sequence" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_recoveries_run_in_one_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="only --recover distill uses several"):
        cut(model, tmp_path / "out", method="block")


@pytest.mark.repeated
def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    atlas, environment = tmp_path / "a.h5", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    built = ["-m", "chanfmt", "build", "model", "-o", str(atlas), "--calib", "pydoc", "--sequences", "24", "--seq-len", "64"]
    subprocess.run([sys.executable, *built], check=True, cwd=tmp_path, env=environment)
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "surgery", "prune", str(atlas), "--model", "model", "--sparsity", "0.5", "--recover", "distill"]
    commands = {"alone": [sys.executable, *words], "out": [sys.executable, "-m", *several, *words]}
    for name, command in commands.items():
        done = subprocess.run([*command, "-o", name, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    expected, found = read(tmp_path / "alone"), read(tmp_path / "out")
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-2 * expected[name].norm(), name
