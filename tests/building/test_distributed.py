"""Builds by several processes under torchrun, against the same build in one process."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.base.errors import ChanfmtError, MissingPackageError, ModelError, UsageError
from chanfmt.building.measure import measure
from chanfmt.building.options import BuildOptions
from chanfmt.building.resume import check_alike
from chanfmt.building.state import REQUEST
from chanfmt.data.tokens import canonical
from chanfmt.format import schema
from chanfmt.format.records import LabelSettings
from chanfmt.models import distributed, load
from chanfmt.models.distributed import Group
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.source import ModelSource
from tests.support import distributed_worker
from tests.support.builds import build, columns_of
from tests.support.tiny import random_tokens, save_tiny, tiny_model

SETTINGS = LabelSettings(rho=0.03, support_size=8)
SUMS = [*(variable.name for variable in schema.SUMS), "sum_q2_split"]
EXACT = ("tokens", "tokens_split", "label", "max_abs_u", "redundancy_tokens", "core_covered")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(processes, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def flags(options):
    """The command line of ``options`` and `SETTINGS`."""
    words = ["chanfmt", "build", options.model, "--rho", str(SETTINGS.rho), "--support", str(SETTINGS.support_size)]
    for name in ("output", "calib", "sequences", "seq_len", "batch_size", "dtype", "checkpoint_every", "columns"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return words + (["--resume"] if options.resume else [])


# A machine with much other work takes minutes to start the processes, and a hang lasts forever.
PATIENCE = 600


def finish(process, seconds=PATIENCE):
    """Exit code and stderr of a torchrun, which must not hang."""
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # If torchrun were killed, it would leave its processes behind.
        process.terminate()
        _, error = process.communicate()
        pytest.fail(f"hangs: {error}")
    return process.returncode, error


def pid_of(process, rank):
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and f"RANK={rank}" in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
        except OSError:
            continue
    raise LookupError(rank)


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def request(model, output, **changes):
    values = {"calib": "pydoc", "sequences": 20, "seq_len": 32, "batch_size": "2", "dtype": "float64", "columns": "all"} | changes
    return BuildOptions(str(model), str(output), **values)


def assert_same(path, expected):
    """Check that two atlases agree: sums to 1e-9, metrics to float32, everything without rounding exactly."""
    with chanfmt.open(path, verify=True) as found, chanfmt.open(expected, verify=True) as other:
        ours, theirs = found.content(), other.content()
    assert ours.status == "complete"
    assert ours.calibration.sequence_sha256 == theirs.calibration.sequence_sha256
    assert ours.calibration.contributions == theirs.calibration.contributions
    assert ours.calibration.mean_loss == pytest.approx(theirs.calibration.mean_loss, rel=1e-9)
    added, other_added = columns_of(ours), columns_of(theirs)
    assert added.keys() == other_added.keys()
    for name, values in added.items():
        # Both nulls pair sequences of one process, so they depend on the number of processes.
        if name.endswith("/redundancy_chance"):
            continue
        np.testing.assert_allclose(values, other_added[name], 0 if values.dtype.kind == "i" else 1e-6, 1e-12, err_msg=name)
    for stack, other_stack in zip(ours.stacks, theirs.stacks, strict=True):
        assert list(stack.variables) == list(other_stack.variables)
        for name, values in stack.variables.items():
            expected_values = other_stack.variables[name]
            if name in EXACT:
                np.testing.assert_array_equal(values, expected_values, name)
            elif name in SUMS:
                np.testing.assert_allclose(values, expected_values, 1e-9, 1e-12 * np.abs(expected_values).max(), err_msg=name)
            elif name != "redundancy_null":
                np.testing.assert_allclose(values, expected_values, 1e-5, 1e-7, err_msg=name)


def assert_several_did_what_one_does(options, processes):
    whole = build(dataclasses.replace(options, output=f"{options.output}.one"), SETTINGS)
    assert_same(options.path, whole)
    with chanfmt.open(options.path) as atlas:
        assert atlas.producer.hardware.startswith(f"{processes} x ")
    assert not options.partial.exists()


def test_two_processes_measure_what_one_does(tiny_checkpoint, tmp_path):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5")
    code, error = finish(start(2, *flags(options)))
    assert code == 0, error
    assert_several_did_what_one_does(options, 2)
    # Only the first process narrates.
    assert error.count("FFNs, ") == error.count("wrote ") == 1


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.repeated)])
def test_an_error_in_one_process_ends_all_with_its_message(processes, tiny_checkpoint, tmp_path):
    code, error = finish(start(processes, "tests.support.failing_phases", str(tiny_checkpoint("llama")), str(tmp_path)))
    assert code == 0, error
    assert [path.name for path in tmp_path.glob("*.h5")] == ["labels.h5"]


@pytest.mark.repeated
def test_three_processes_sum_fail_run_out_of_memory_and_measure_experts_as_one(tmp_path):
    checkpoint = save_tiny(
        tmp_path / "model",
        "mixtral",
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    options = request(checkpoint, tmp_path / "a.h5")
    process = start(3, "tests.support.distributed_worker", str(tmp_path / "sums.pt"), options.model, options.output)
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    tokens = canonical(random_tokens(distributed_worker.SEQUENCES, distributed_worker.SEQ_LEN).numpy())
    expected = measure(model, find_ffns(model), tokens, rho=0.03, batch_size=1)
    code, error = finish(process)
    assert code == 0, error
    loss, states = torch.load(tmp_path / "sums.pt", weights_only=False)
    assert loss == pytest.approx(expected.loss, rel=1e-9)
    for found, item in zip(states, expected.statistics, strict=True):
        for name, values in item.state().items():
            # The nulls pair sequences of one process, so they depend on their number.
            if not name.startswith(("null", "last", "chance", "offsets")):
                np.testing.assert_allclose(found[name], values, 1e-9, 1e-12 * np.abs(values).max(), err_msg=name)
        assert found["null_count"] > 0
    assert_several_did_what_one_does(options, 3)


def test_one_process_reports_for_all(tmp_path):
    process = start(2, *flags(request(tmp_path / "nowhere", tmp_path / "a.h5")))
    code, error = finish(process)
    assert code == 1
    assert error.count("atlas: error:") == 1
    assert "Traceback (most recent call last):" not in error.partition("torch")[0]


def test_processes_that_differ_say_in_what():
    class Other(Group):
        rank, size = 1, 2

        def exchange(self, value):
            return [value | {"revision": "1f"}, value]

    asked = dict.fromkeys(REQUEST, "same")
    with pytest.raises(ChanfmtError, match=r"ranks 1 and 0 of 2 differ in: the calibration text\n"):
        check_alike(asked, Other())


@pytest.mark.parametrize(
    ("device", "gpus", "here", "expected"),
    [
        ("auto", 0, 2, "cpu"),
        ("cpu", 2, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cuda", 2, 2, "cuda:1"),
        ("cuda:0", 2, 2, "cannot be shared by 4"),
        ("auto", 1, 2, "2 processes were started on a machine with 1 GPUs"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device, gpus, here, expected):
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    try:
        found = distributed._own_device(device)
    except UsageError as error:
        found = error.message
    assert expected in found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by its environment in /proc")
def test_a_killed_process_ends_the_run_which_others_continue(tiny_checkpoint, tmp_path):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", sequences=160, checkpoint_every=0)
    process = start(3, *flags(options))
    whole = build(dataclasses.replace(options, output=str(tmp_path / "one.h5"), checkpoint_every=None), SETTINGS)
    wait_for(options.partial.exists, process)
    os.kill(pid_of(process, 1), signal.SIGKILL)
    code, error = finish(process)
    assert code == 1
    (line,) = (line for line in error.splitlines() if line.startswith("atlas:"))
    assert line.startswith("atlas: error: rank 1 of 3 was lost")
    assert f"{options.partial} holds what was measured; continue with the same command and --resume" in error

    with chanfmt.open(options.partial, verify=True) as atlas:
        done = atlas.calibration.sequences
        assert 0 < done < 160
    several = dataclasses.replace(options, output=str(tmp_path / "b.h5"), resume=True, checkpoint_every=0)
    shutil.copy(options.partial, several.partial)
    process = start(2, *flags(several))
    assert_same(build(dataclasses.replace(options, resume=True, checkpoint_every=None), SETTINGS), whole)

    # Another number of processes continues the build, and is interrupted too.
    before = several.partial.stat().st_ino
    wait_for(lambda: several.partial.stat().st_ino != before, process)
    process.send_signal(signal.SIGINT)
    _, error = finish(process)
    assert f"continuing after {done} of 160 sequences" in error
    assert "atlas: interrupted; " in error
    with chanfmt.open(several.partial, verify=True) as atlas:
        assert done < atlas.calibration.sequences < 160
    assert_same(build(dataclasses.replace(several, checkpoint_every=None), SETTINGS), whole)


def test_a_process_lost_before_the_pass_is_named_at_once():
    begun = time.monotonic()
    code, error = finish(start(3, "tests.support.lost_worker"))
    assert code == 1
    assert "rank 0: rank 1 of 3 was lost" in error
    assert time.monotonic() - begun < PATIENCE


def test_device_map_needs_no_gpu(tiny_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", device_map="auto")
    whole = build(dataclasses.replace(options, output=str(tmp_path / "b.h5"), device_map=None), SETTINGS)
    assert_same(build(options, SETTINGS), whole)
    with pytest.raises(UsageError, match="chooses the devices"):
        build(dataclasses.replace(options, device="cpu", overwrite=True), SETTINGS)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun started several"):
        build(options, SETTINGS)


def test_device_map_refuses_what_it_cannot_do(tiny_checkpoint, monkeypatch):
    pytest.importorskip("accelerate")
    from transformers.integrations import accelerate

    resolved = ModelSource(tiny_checkpoint("llama"))
    monkeypatch.setattr(accelerate, "get_max_memory", lambda asked: {"cpu": 40_000})
    with pytest.raises(ModelError, match="leave weights on disk"):
        load.load_model(resolved, device_map="auto")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="accelerate"):
        load.load_model(resolved, device_map="auto")
