"""Every command that writes: ``-o -``, pipes, a home directory, other writers at work, and what appears meanwhile."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from chanfmt.base.claims import claimed
from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.factory import random_atlas
from tui.cli import main as tui


def commands(place: Path, model: str) -> dict[str, tuple]:
    """Every command with an output, without the output; all of them could be carried out but ``pull``."""
    path = str(place / "a.h5")
    text = ["--data", "pydoc", "--max-tokens", "64", "--seq-len", "32", "--model", model]
    return {
        "build": (atlas, ["build", model, "--calib", "pydoc", "--sequences", "4", "--seq-len", "32"]),
        "merge": (atlas, ["merge", path, str(place / "b.h5")]),
        "label": (atlas, ["label", path, "--rho", "0.02"]),
        "strip": (atlas, ["strip", path]),
        "export": (atlas, ["export", path]),
        "import": (atlas, ["import", path, "--column", f"x_lab/score={place / 'score.csv'}"]),
        "pull": (atlas, ["pull", "somebody/atlas"]),
        "report": (atlas, ["report", path]),
        "trajectory": (atlas, ["trajectory", path, str(place / "b.h5")]),
        "plan": (surgery, ["plan", path, "--sparsity", "0.5"]),
        "prune": (surgery, ["prune", str(place / "tiny.h5"), "--sparsity", "0.5", "--model", model, "--no-verify"]),
        "apply": (surgery, ["apply", str(place / "tiny-plan"), "--model", model, "--no-verify"]),
        "restore": (surgery, ["restore", str(place / "pruned"), "--no-verify"]),
        "sweep": (surgery, ["sweep", str(place / "tiny.h5"), "--sparsity", "0.5", *text]),
        "ablate": (surgery, ["ablate", "dose", str(place / "tiny.h5"), *text]),
        "screenshot": (tui, [path, "--screenshot", "layer"]),
    }


@pytest.fixture(scope="module")
def made(tiny_atlas, tiny_checkpoint, tmp_path_factory):
    """A directory with inputs for every command."""
    directory = tmp_path_factory.mktemp("inputs")
    for name, seed in (("a.h5", 0), ("b.h5", 1)):
        random_atlas(directory / name, seed=seed)
    (directory / "score.csv").write_text("layer,channel,score\n0,1,0.5\n")
    tiny = str(shutil.copy(tiny_atlas("llama"), directory / "tiny.h5"))
    assert surgery(["plan", tiny, "--sparsity", "0.5", "-o", str(directory / "tiny-plan"), "--quiet"]) == 0
    words = ["--model", str(tiny_checkpoint("llama")), "--no-verify", "-o", str(directory / "pruned"), "--quiet"]
    assert surgery(["apply", str(directory / "tiny-plan"), *words]) == 0
    return directory


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def refused(main, words, capsys) -> str:
    """What ``main`` says on stderr; it must end with one line, a hint and exit code 2."""
    capsys.readouterr()
    assert main(words) == 2, words
    said = capsys.readouterr()
    assert said.out == "", words
    assert "error: " in said.err, words
    assert "Traceback" not in said.err
    return said.err


NAMES = list(commands(Path(), "m"))


def flag(name: str) -> str:
    return "--export-svg" if name == "screenshot" else "-o"


@pytest.mark.parametrize("name", NAMES)
def test_standard_output_is_refused(name, place, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    main, words = commands(place, str(tiny_checkpoint("llama")))[name]
    assert "cannot be standard output" in refused(main, [*words, flag(name), "-"], capsys)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("sweep", "ablate")])
def test_a_pipe_is_never_replaced(name, place, tiny_checkpoint, capsys):
    pipe = place / ("pipe.csv" if name == "export" else "pipe")
    os.mkfifo(pipe)
    main, words = commands(place, str(tiny_checkpoint("llama")))[name]
    for more in ([], ["--overwrite"]):
        assert "is never replaced" in refused(main, [*words, flag(name), str(pipe), *more], capsys)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("plan", "screenshot")])
def test_another_command_that_writes_the_output_is_noticed(name, place, tiny_checkpoint, capsys):
    output = place / ("out.csv" if name == "export" else "out")
    main, words = commands(place, str(tiny_checkpoint("llama")))[name]
    before = sorted(item.name for item in place.iterdir())
    with claimed(output):
        for more in ([],) if name in ("ablate", "sweep") else ([], ["--overwrite"]):
            said = refused(main, [*words, "-o", str(output), *more], capsys)
            assert f"process {os.getpid()} on " in said, said
    assert sorted(item.name for item in place.iterdir()) == before


@pytest.mark.parametrize("name", ["strip", "export", "import", "plan", "label", "screenshot"])
def test_a_home_directory(name, place, tiny_checkpoint, monkeypatch, capsys):
    """Of --output=~/x the shell expands nothing."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    main, words = commands(place, str(tiny_checkpoint("llama")))[name]
    output = place / ("out.csv" if name == "export" else "out.svg")
    long = "--export-svg" if name == "screenshot" else "--output"
    assert main([*words, f"{long}=~/{output.name}"]) == 0, capsys.readouterr().err
    assert output.is_file()
    assert not (place / "~").exists()


@pytest.mark.parametrize("name", ["strip", "export", "import", "plan", "label"])
def test_a_private_file_stays_private_and_a_link_stays_a_link(name, place, tiny_checkpoint, capsys):
    suffix = ".csv" if name == "export" else ""
    (place / "disk").mkdir()
    target, link = place / "disk" / f"target{suffix}", place / f"link{suffix}"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    main, words = commands(place, str(tiny_checkpoint("llama")))[name]
    assert main([*words, "-o", str(link), "--overwrite"]) == 0, capsys.readouterr().err
    assert link.is_symlink()
    assert target.stat().st_size > 3
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [item.name for item in (place / "disk").iterdir()] == [target.name]
