"""The examples' scripts run, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

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


def test_a_result_is_distilled_with_a_trainer(model: Path, tmp_path: Path) -> None:
    """The divergence on held-out text falls, and only FFNs change."""
    text = tmp_path / "text.txt"
    text.write_text("the def of class " * 40)
    save_tiny(tmp_path / "cut", "llama", intermediate_size=400)
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for layer in student.model.layers:
        layer.mlp.down_proj.weight.data *= 0.5
    student.save_pretrained(tmp_path / "cut")
    arguments = ["--steps", 12, "--length", 40, "--batch", 4, "--rate", 5e-4]
    said = run("distill.py", model, tmp_path / "cut", text, tmp_path / "out", *arguments)
    found = re.search(r"KL on 2 held-out sequences: ([0-9.]+) to ([0-9.]+) nats/token", said)
    assert found
    assert float(found[2]) < float(found[1])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert {name.split(".")[3] for name in before if not torch.equal(before[name], after[name])} == {"mlp"}
