"""What needs no model is checked before the model: each mistake is reported although the model could not be opened.

The models of these commands do not exist, or are directories whose config cannot be read. If a command looked for its model
first, its error would be about the model.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from pathlib import Path

BUILD = "atlas build MODEL -o new.h5"
PRUNE = "surgery prune a.h5 --model MODEL --sparsity 0.5 -o new"
EVAL = "surgery eval MODEL --data text.txt"
SWEEP = "surgery sweep a.h5 --model MODEL -o new --data text.txt"
ABLATE = "surgery ablate remove a.h5 --model MODEL -o new --data text.txt"
APPLY = "surgery apply plan.safetensors --model MODEL -o new"

MISTAKES = [
    (f"{BUILD} --calib missing.txt", "missing.txt does not exist"),
    (f"{BUILD} --calib missing.npz", "missing.npz cannot be read"),
    (f"{BUILD} --calib text.npz", "text.npz is not a .npz file"),
    (f"{BUILD} --calib missing.csv", "missing.csv does not exist"),
    (f"{BUILD} --calib a.h5", "a.h5 is not a text source"),
    (f"{BUILD} --calib folder.txt", "folder.txt is a directory"),
    (f"{BUILD} --calib a/b/c", "neither a text file nor the name of a data set"),
    (f"{BUILD} --calib pydoc --calib missing.txt", "missing.txt does not exist"),
    (f"{BUILD} --calib images.npz --stream", "--stream runs token sequences"),
    (f"{BUILD} --calib pydoc --dtype int3", "unknown dtype 'int3'"),
    (f"{BUILD} --calib pydoc --device gpu", "for a GPU, write cuda"),
    (f"{BUILD} --calib pydoc --loss labels", "--loss labels is for a file of inputs"),
    (f"{BUILD} --calib pydoc --rho 2", "--rho must lie in"),
    (f"{BUILD} --calib pydoc --batch-size 0", "--batch-size must be"),
    (f"{BUILD} --calib pydoc --seq-len 1", "--seq-len must be at least 2"),
    (f"{BUILD} --calib missing.txt --revisions a,b", "missing.txt does not exist"),
    ("atlas build MODEL -o a.h5 --calib pydoc", "a.h5 exists"),
    ("atlas build MODEL -o nowhere/a.h5 --calib pydoc", "nowhere does not exist"),
    ("atlas label a.h5 --model MODEL --rho 2 -o nowhere/b.h5", "nowhere does not exist"),
    ("atlas merge a.h5 a.h5 --model MODEL -o new.h5", "are the same atlas"),
    (f"{PRUNE}-b --shard-size 5", "'5' is not a size"),
    (f"{PRUNE} --method beauty", "unknown method 'beauty'"),
    (f"{PRUNE} --recover beauty", "unknown recovery 'beauty'"),
    (f"{PRUNE} --recover lstsq --recover-device gpu", "--recover-device 'gpu' cannot be used"),
    (f"{PRUNE} --protect beauty", "unknown selector 'beauty'"),
    (f"{PRUNE} --protect missing.json", "missing.json"),
    (f"{PRUNE} --layers 99", "layer 99"),
    (f"{PRUNE} --push a//b", "cannot be the name of a repository"),
    (f"{PRUNE} --public", "are for --push"),
    ("surgery prune a.h5 --model MODEL --sparsity 50", "write 0.5 for 50%"),
    ("surgery prune a.h5 --model MODEL --sparsity 0.5 -o nowhere/new", "nowhere does not exist"),
    ("surgery prune a.h5 --model MODEL --sparsity 0.5 -o folder.txt", "folder.txt exists"),
    (f"{APPLY} --shard-size 5", "'5' is not a size"),
    (APPLY, "the plan plan.safetensors does not exist"),
    ("surgery restore MODEL -o new --shard-size 5", "'5' is not a size"),
    ("surgery restore MODEL -o nowhere/new", "nowhere does not exist"),
    ("surgery eval MODEL --data missing.txt", "missing.txt does not exist"),
    ("surgery eval MODEL --data images.npz", "images.npz holds inputs of one model"),
    ("surgery eval MODEL --data self", "self is sampled from the measured model"),
    (f"{EVAL} --seq-len 1", "--seq-len must be at least 2"),
    (f"{EVAL} --dtype int3", "unknown dtype 'int3'"),
    (f"{EVAL} --device gpu", "for a GPU, write cuda"),
    (f"{EVAL} --tasks-from nowhere --tasks x", "--tasks-from nowhere is not a directory"),
    ("surgery sweep a.h5 --model MODEL -o new --data missing.txt", "missing.txt does not exist"),
    (f"{SWEEP} --dtype int3", "unknown dtype 'int3'"),
    (f"{SWEEP} --device gpu", "for a GPU, write cuda"),
    (f"{SWEEP} --seq-len 1", "--seq-len must be at least 2"),
    (f"{SWEEP} --methods beauty", "unknown method 'beauty'"),
    (f"{SWEEP} --sparsity 50", "--sparsity"),
    (f"{SWEEP} --recover beauty", "unknown recovery 'beauty'"),
    ("surgery sweep a.h5 --model MODEL -o nowhere/new --data text.txt", "nowhere does not exist"),
    ("surgery sweep a.h5 --model MODEL -o damaged --data text.txt", "results.json is not a results file"),
    ("surgery ablate remove a.h5 --model MODEL -o new --data missing.txt", "missing.txt does not exist"),
    ("surgery ablate remove a.h5 --model MODEL -o damaged --data text.txt", "results.json is not a results file"),
    (f"{ABLATE} --dtype int3", "unknown dtype 'int3'"),
    (f"{ABLATE} --select beauty", "unknown selector 'beauty'"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an atlas, texts, and a model whose config cannot be read."""
    monkeypatch.chdir(tmp_path)
    random_atlas(tmp_path / "a.h5")
    (tmp_path / "text.txt").write_text("Some text.\n" * 200)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "images.npz", pixel_values=np.zeros((4, 3, 8, 8), np.float32))
    for name in ("broken", "folder.txt", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("this is not JSON")
    (tmp_path / "damaged" / "results.json").write_text("this is not JSON either")
    return tmp_path


@pytest.mark.parametrize("model", ["no/such-model", "broken"])
@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_the_mistake_is_named_and_not_the_model(
    place: Path, capsys: pytest.CaptureFixture[str], line: str, message: str, model: str
) -> None:
    before = sorted(os.listdir(place))
    program, *arguments = line.replace("MODEL", model).split()
    code = {"atlas": atlas, "surgery": surgery}[program](arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert model not in error
    assert sorted(os.listdir(place)) == before


def test_a_missing_package_is_named_before_the_model(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of None in ``sys.modules`` is how Python marks a package that cannot be imported."""
    for package in ("accelerate", "lm_eval"):
        monkeypatch.setitem(sys.modules, package, None)
    for line, message in (
        (f"{BUILD} --calib pydoc --device-map auto", "pip install accelerate (it is in chanfmt's extra [multi-gpu])"),
        ("surgery eval MODEL --data pydoc --tasks arc_easy", "pip install lm-eval"),
    ):
        program, *arguments = line.replace("MODEL", "no/such-model").split()
        assert {"atlas": atlas, "surgery": surgery}[program](arguments) == 1
        assert message in capsys.readouterr().err
