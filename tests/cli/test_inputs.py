"""Inputs as users name them, and files that are not quite what they should be."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import chanfmt
from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support import browsed
from tests.support.factory import random_atlas
from tui.cli import main as browser

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home directory, which holds an atlas and a protect file, and is not the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    random_atlas(tmp_path / "home" / "a.h5")
    (tmp_path / "home" / "p.txt").write_text("1:3\n")
    (tmp_path / "home" / "p.csv").write_text("1,3\n")
    return tmp_path / "home"


def test_every_input_expands_the_home_directory(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home.parent / "work"
    assert atlas(["info", "~/a.h5"]) == 0
    assert atlas(["show", "~/a.h5", "--layer", "1"]) == 0
    assert atlas(["validate", "~/a.h5"]) == 0
    assert atlas(["compare", "~/a.h5", "~/a.h5"]) == 0
    assert atlas(["export", "~/a.h5", "-o", str(out / "a.csv")]) == 0
    assert atlas(["label", "~/a.h5", "--rho", "0.02", "-o", str(out / "b.h5")]) == 0
    assert atlas(["report", "~/a.h5", "-o", str(out / "r")]) == 0
    plan = ["plan", "~/a.h5", "--sparsity", "0.5", "--protect=~/p.csv", "-o", str(home / "plan.safetensors")]
    assert surgery(plan) == 0
    assert surgery(["apply", "~/plan.safetensors", "-o", str(out / "cut")]) == 2
    assert "does not say where it is" in capsys.readouterr().err
    assert browser(["~/a.h5", "--screenshot", "overview", "--protect", "~/p.json", "--export-svg", str(out / "a.svg")]) == 0
    with chanfmt.open("~/a.h5") as found:
        assert found.path.is_absolute()
    assert not (out / "~").exists()


@pytest.mark.parametrize("text", ["1;3\n", "layer;channel\n1;3\n", "1\t3\n"])
def test_another_separator_is_named(home: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (home / "p.csv").write_text(text)
    assert surgery(["plan", "~/a.h5", "--sparsity", "0.5", "--protect", "~/p.csv"]) == 2
    said = capsys.readouterr().err
    assert f"its columns are separated by {'tabs' if chr(9) in text else 'semicolons'}, not commas" in said
    assert "with commas" in said


def test_what_is_unknown_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lp = np.ones((4, 96))
    lp[1] = np.nan
    path = browsed.with_lp(tmp_path / "a.h5", lp)
    assert atlas(["info", str(path)]) == 0
    assert "nan" not in capsys.readouterr().out.lower()


@pytest.mark.parametrize("place", ["file/home", "/proc/no-such"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    code = (
        "from huggingface_hub import constants\n"
        "from chanfmt.hub.failures import hub_errors\n"
        "import os\n"
        "with hub_errors('ann/tiny'):\n"
        "    os.makedirs(constants.HF_HUB_CACHE)\n"
    )
    home = str(tmp_path / place)
    environment = os.environ | {"HF_HOME": home}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    said = done.stderr.strip().splitlines()
    assert f"the Hub cache in {home} cannot be used" in said[-2]
    assert "set HF_HOME to another directory" in said[-1]


def test_the_command_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = os.environ | {"HF_HOME": str(tmp_path / "file" / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "chanfmt", "build", "ann/tiny", "--calib", "pydoc", "-o", str(tmp_path / "a.h5")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert "cannot be used" in error
    assert "HF_HOME" in hint
