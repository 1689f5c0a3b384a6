"""The examples' scripts run, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chanfmt
from chanfmt.cli.main import main
from tests.support.tiny import save_tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama", intermediate_size=400)
    return directory


def run(name: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_padded_rows_are_measured_as_they_stand(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the def of class {number}" for number in range(9)))
    said = run("padded_rows.py", model, text, 6, 40, tmp_path / "rows.npz")
    rows = np.load(tmp_path / "rows.npz")["input_ids"]
    padding = int((rows == tiny_tokenizer().eos_token_id).sum())
    assert rows.shape == (6, 40)
    assert said == f"6 rows, {rows.size - padding} tokens of text and {padding} of padding\n"
    command = ["build", model, "-o", tmp_path / "a.h5", "--calib", tmp_path / "rows.npz", "--sequences", 6]
    assert main([*map(str, command)]) == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert atlas.calibration.tokens == rows.size


def test_the_epsilon_hides_what_is_there(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = ["the", "a", "of", "class", "def", "is", "an", "object", "function", "module", "value", "name", "type", "list"]
    text.write_text(" ".join(np.random.default_rng(0).choice(words, 12_000)))
    rows = [line.split("|") for line in run("redundancy_epsilon.py", model, text, 0, 2).splitlines() if line.startswith("| ")]
    cells = [[float(cell) for cell in row[2:7]] for row in rows[2:]]
    assert [int(row[1]) for row in rows[2:]] == [0, 2]
    for _, exact, null, covered, _ in cells:
        assert exact > 0
        assert null > 0
        assert covered < exact
