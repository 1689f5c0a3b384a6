"""Values of options that no file system, no parser and no number type takes: one line and a hint, and no traceback."""

from __future__ import annotations

import pytest

from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.factory import random_atlas

LONG = "x" * 300
DIGITS = "9" * 5000


@pytest.mark.parametrize("name", [LONG, f"{LONG}.txt"], ids=["name", "text file"])
def test_a_name_that_is_too_long_is_refused_in_one_line(name, tiny_checkpoint, tmp_path, capsys) -> None:
    path, model = random_atlas(tmp_path / "a.h5"), str(tiny_checkpoint("llama"))
    capsys.readouterr()
    for main, words in (
        (atlas, ["validate", name]),
        (atlas, ["info", name]),
        (atlas, ["build", name, "-o", str(tmp_path / "out.h5")]),
        (atlas, ["build", model, "--seq-len", "64", "--calib", name, "-o", str(tmp_path / "out.h5")]),
        (atlas, ["build", model, "--seq-len", "64", "--calib", "pydoc", "-o", name]),
        (atlas, ["build", model, "--seq-len", "64", "--calib", "pydoc", "--revisions", "a,b", "-o", name]),
        (surgery, ["eval", model, "--data", name]),
        (surgery, ["eval", model, "--data", "pydoc", "--tasks", "a", "--tasks-from", name]),
        (surgery, ["sweep", str(path), "--model", model, "--data", "pydoc", "--sparsity", "0.5", "-o", name]),
        (surgery, ["sweep", str(path), "--model", model, "--data", name, "--sparsity", "0.5", "-o", str(tmp_path / "sweep")]),
    ):
        refused(main, words, capsys)


def test_a_series_is_refused_below_a_file(tiny_checkpoint, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    model = str(tiny_checkpoint("llama"))
    capsys.readouterr()
    said = refused(atlas, ["build", model, "--calib", "pydoc", "--revisions", "a", "-o", str(tmp_path / "file" / "out")], capsys)
    assert "Not a directory" in said


@pytest.mark.parametrize("value", ["0", "", "-1", "1.5", "²", DIGITS], ids=lambda value: value[:5])
def test_a_batch_size_is_a_number_of_sensible_length(value, tmp_path, capsys) -> None:
    said = refused(atlas, ["build", "x", "-o", str(tmp_path / "out.h5"), f"--batch-size={value}"], capsys)
    assert said.startswith("atlas: error: --batch-size must be a positive number or auto, not ")
    assert len(said) < 200


@pytest.mark.parametrize("flag", ["--sparsity", "--method", "--layers", "--seed", "--allocation", "--output"])
def test_two_dashes_are_a_value_like_any_other(flag, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = random_atlas(tmp_path / "a.h5")
    words = ["plan", str(path), "--sparsity", "0.5", f"{flag}=--"]
    if flag == "--output":
        assert surgery(words) == 0
        assert (tmp_path / "--").is_file()
    else:
        assert "--" in refused(surgery, words, capsys)


def refused(main, words, capsys) -> str:
    """Error text of a command that must refuse ``words``."""
    # 1: data sets need a package that may be missing.
    assert main(words) in (1, 2), words
    printed = capsys.readouterr()
    first, *hints = printed.err.splitlines()
    assert printed.out == ""
    assert ": error: " in first
    assert all(line.startswith("  ") for line in hints)
    return first
