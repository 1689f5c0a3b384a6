"""What people type the first time: files in each other's places, wrong spellings. Each error says what to type instead."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING

import pytest

from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from pathlib import Path

MISTAKES = [
    ("atlas build a.h5 -o new.h5 --calib pydoc", "a.h5 is an HDF5 file, such as an atlas, not a model", "config.json"),
    ("atlas build plan.safetensors -o new.h5 --calib pydoc", "such as a plan", "config.json"),
    ("atlas build empty -o new.h5 --calib pydoc", "has no config.json", "a model is a directory"),
    ("atlas build outer -o new.h5 --calib pydoc", "has no config.json", "name the directory in it: outer/model"),
    ("atlas build quantised -o new.h5 --calib pydoc", "has no config.json", "name the .gguf file in it: quantised/q4.gguf"),
    ("atlas build ./modle -o new.h5 --calib pydoc", "the directory './modle' does not exist", "a Hub id"),
    ("atlas build missing.h5 -o new.h5 --calib pydoc", "missing.h5 does not exist", "a model is a directory"),
    ("atlas build https://huggingface.co/org/name -o new.h5 --calib pydoc", "not the id of a model", "write: org/name"),
    ("atlas build hf://org/name -o new.h5 --calib pydoc", "not the id of a model", "write: org/name"),
    ("atlas build a,b -o new.h5 --calib pydoc", "neither on this machine nor the name of a model", "USER/NAME"),
    ("atlas build '' -o new.h5 --calib pydoc", "the name of the model is empty", "a Hub id"),
    ("atlas build model -o '' --calib pydoc", "the name is empty", ""),
    ("atlas build model -o . --calib pydoc", "names no file", "such as llama.h5"),
    ("atlas build model -o new.h5 --calib pydoc --revisions a,b", "model has no directory a", "inside"),
    ("atlas info model", "a directory, not an atlas file", "atlas build model -o FILE"),
    ("atlas info result", "a directory, not an atlas file", "the atlas of this result is result/atlas.h5"),
    ("atlas info plan.safetensors", "not an importance atlas", "surgery apply PLAN"),
    ("atlas compare a.h5 model", "a directory, not an atlas file", "atlas build"),
    ("surgery plan a.h5 --sparsity 0.5 -o ''", "the name is empty", ""),
    ("surgery prune model --sparsity 0.5", "a directory, not an atlas file", "atlas build model -o FILE"),
    ("surgery prune a.h5 --model a.h5 --sparsity 0.5", "not a model", "a model is a directory"),
    ("surgery prune a.h5 --model model --sparsity 50%", "invalid float value", "write 0.5 for 50%"),
    ("surgery prune a.h5 --model result --sparsity 0.5 -o new", "result is a result of surgery", "build an atlas of it"),
    (
        "surgery prune a.h5 --model model --sparsity 0.5 -o new",
        "is not the model of the atlas",
        "surgery plan ATLAS --sparsity S -o PLAN",
    ),
    (
        "surgery apply plan.safetensors --model model -o new",
        "is not the model",
        "use: surgery apply PLAN --model MODEL --fine-tune",
    ),
    ("surgery apply a.h5 --model model", "a.h5 is not a pruning plan", "surgery prune"),
    ("surgery apply result --model model", "a directory, not a plan", "result/kept_channels.safetensors"),
    ("surgery apply missing.safetensors --model model", "the plan missing.safetensors does not exist", "surgery plan"),
    ("surgery restore model -o new", "model has no kept_channels.safetensors", "of surgery prune or apply"),
    ("surgery sweep a.h5 --model model -o result --data pydoc", "result holds a model", "another -o"),
    ("surgery push a.h5", "a.h5 is a file", "atlas push"),
    ("surgery push org/name result", "DIR and REPO are in each other's places", "write: surgery push result org/name"),
    ("surgery push org/name", "the directory org/name does not exist", "surgery prune"),
    ("surgery eval a.h5 --data pydoc", "not a model", "a model is a directory"),
    ("surgery eval model --data model", "not a text source", "pydoc"),
    # Arguments in each other's places, with and without their flags.
    (
        "atlas build new.h5 -o model --calib pydoc",
        "MODEL and -o are in each other's places",
        "write: atlas build model -o new.h5",
    ),
    ("atlas push org/name a.h5", "FILE and REPO are in each other's places", "write: atlas push a.h5 org/name"),
    ("surgery prune model a.h5 --sparsity 0.5", "unexpected argument 'a.h5'", "write: surgery prune a.h5 --model model"),
    ("surgery prune a.h5 model --sparsity 0.5", "unexpected argument 'model'", "write: surgery prune a.h5 --model model"),
    ("surgery prune a.h5 org/name --sparsity 0.5", "unexpected argument", "write: surgery prune a.h5 --model org/name"),
    ("surgery prune model --model a.h5 --sparsity 0.5", "in each other's places", "write: surgery prune a.h5 --model model"),
    ("surgery apply model plan.safetensors", "unexpected argument", "write: surgery apply plan.safetensors --model model"),
    ("atlas build model new.h5", "unexpected argument 'new.h5'", "write: atlas build model -o new.h5"),
    ("atlas export a.h5 out.csv", "unexpected argument 'out.csv'", "write: atlas export a.h5 -o out.csv"),
    ("atlas show a.h5 3", "unexpected argument '3'", "write: atlas show a.h5 --layer 3"),
    # What is missing is named with what it is.
    ("atlas build model", "-o FILE is missing", "add -o FILE: atlas file to write"),
    ("surgery prune a.h5", "nothing says how much to remove", "add --sparsity 0.5"),
    ("atlas build", "MODEL and -o FILE are missing", "add MODEL: Hub id"),
    ("atlas label a.h5 --rho 0.02", "-o FILE is missing", "--overwrite to replace a.h5 itself"),
    # Commands and options of another command.
    ("atlas prune a.h5 --sparsity 0.5", "prune is a command of surgery", "write: surgery prune"),
    ("surgery build model -o new.h5", "build is a command of atlas", "write: atlas build"),
    ("surgery plan a.h5 --sparsity 0.5 --model model", "--model has no effect without --format gguf", "leave it out"),
    ("surgery push result --push", "it is an option of surgery shrink, surgery prune", "surgery push --help"),
    ("atlas build model -o new.h5 --sparsity 0.5", "it is an option of surgery prune", "atlas build --help"),
    ("surgery eval model --calib pydoc", "here it is called --data", "surgery eval --help"),
    ("atlas show a.h5 --layer 0 --metric lp", "here it is called --sort", "atlas show --help"),
    ("atlas --json info a.h5", "--json is an option of commands", "after the command"),
]


@pytest.fixture
def place(tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # type: ignore[no-untyped-def]
    """A working directory with a model, an atlas, a plan and a result."""
    monkeypatch.chdir(tmp_path)
    random_atlas(tmp_path / "a.h5")
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    (tmp_path / "model" / "inside").mkdir()
    for name in ("empty", "outer", "quantised"):
        (tmp_path / name).mkdir()
    shutil.copytree(tmp_path / "model", tmp_path / "outer" / "model")
    (tmp_path / "quantised" / "q4.gguf").write_bytes(b"GGUF")
    assert surgery(["plan", "a.h5", "--sparsity", "0.5", "-o", "plan.safetensors", "--quiet"]) == 0
    shutil.copytree(tmp_path / "model", tmp_path / "result")
    (tmp_path / "result" / "surgery.json").write_text("{}")
    shutil.copyfile("a.h5", "result/atlas.h5")
    return tmp_path


def test_every_mistake_has_its_way_out(tiny_checkpoint, place: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    for line, message, hint in MISTAKES:
        capsys.readouterr()
        program, *arguments = shlex.split(line)
        code = {"atlas": atlas, "surgery": surgery}[program](arguments)
        error = capsys.readouterr().err
        assert code == 2, (line, error)
        assert message in error, (line, error)
        assert hint in error, (line, error)
        assert "Traceback" not in error
    shutil.copytree(tiny_checkpoint("gpt2"), place / "other")
    assert surgery(["prune", "a.h5", "--model", "other", "--sparsity", "0.5", "-o", "new"]) == 2
    assert "--fine-tune" not in capsys.readouterr().err
    assert not (place / "new").exists()
    assert not (place / "new.h5").exists()
