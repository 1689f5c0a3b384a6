"""The examples' scripts run, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import chanfmt
from chanfmt.cli.main import main
from tests.support.hub.client import environment
from tests.support.tiny import save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from tests.support.hub.server import Hub

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOKEN = "hf_SecretTokenOfAnn123"


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


def heal(model: Path, tmp_path: Path, *arguments: object) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Heal a damaged copy of ``model``. Returns what is printed, and the tensors before and after."""
    text = tmp_path / "text.txt"
    text.write_text("the def of class\n" * 90)
    student = transformers.AutoModelForCausalLM.from_pretrained(model)
    for layer in student.model.layers:
        layer.mlp.down_proj.weight.data *= 0.5
    student.save_pretrained(tmp_path / "cut")
    tiny_tokenizer().save_pretrained(tmp_path / "cut")
    settings = ["--text", text, "--other", "none", "--length", 32, "--batch", 4, "--eval-tokens", 96]
    said = run("heal.py", model, tmp_path / "cut", "-o", tmp_path / "out", *settings, *arguments)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    return said, before, after


def divergence(said: str) -> tuple[float, float]:
    found = re.search(r"KL on 8 held-out sequences: ([0-9.]+) to ([0-9.]+) nats/token", said)
    assert found, said
    return float(found[1]), float(found[2])


def test_a_cut_model_is_healed_by_training_its_ffns(model: Path, tmp_path: Path) -> None:
    """The divergence on held-out text falls, only FFNs change, and the three models are compared."""
    said, before, after = heal(model, tmp_path, "--train", "ffn", "--steps", 12, "--rate", 5e-4)
    old, new = divergence(said)
    assert new < old
    assert {name.split(".")[3] for name in before if not torch.equal(before[name], after[name])} == {"mlp"}
    assert re.search(r"^text.txt \(held out\)( +\d\.\d{4}){3}", said, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "heal.py", model, tmp_path / "cut", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "exists" in done.stderr


def test_a_cut_model_is_healed_by_low_rank_matrices(model: Path, tmp_path: Path) -> None:
    """They are merged: the tensors are those of the cut model, and every linear layer has changed, in the time that is given."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    said, before, after = heal(model, tmp_path, "--train", "lora", "--minutes", 0.02)
    old, new = divergence(said)
    assert new < old
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_the_first_hour_goes_from_a_model_to_an_answer(model: Path, hub: Hub, tmp_path: Path) -> None:
    """The script with the commands of this environment, on a tiny model, with the test Hub as its Hub; healing takes a second."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in (("atlas", " -m chanfmt"), ("surgery", " -m surgery"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (commands / name).chmod(0o755)
    hub.add_user(TOKEN, "ann")
    settings = {"BIN": str(commands), "WORK": str(tmp_path / "hour"), "HEAL_MINUTES": "0.02"}
    settings |= {"SEQUENCES": "4", "SEQ_LEN": "64", "EVAL_TOKENS": "128"}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", EXAMPLES / "first_hour.sh", model],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home", TOKEN) | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5", "6", "7", "8"]
    hour = tmp_path / "hour"
    assert (hour / "report" / "report.html").is_file()
    assert hub.files("ann/first-hour")["config.json"] == (hour / "small" / "config.json").read_bytes()
    assert "skipped: CONVERTER names no convert_hf_to_gguf.py" in done.stdout
    sizes = [
        sum(item.numel() for item in transformers.AutoModelForCausalLM.from_pretrained(path).parameters())
        for path in (model, hour / "small", hour / "healed")
    ]
    assert sizes[1] == sizes[2] <= 0.8 * sizes[0]
    asked = done.stdout[done.stdout.index("8. Ask") :]
    assert re.search(r"^prompt +What is the capital of France\?", asked, re.MULTILINE)
    assert len(re.findall(r'^\S+ +".*"$', asked, re.MULTILINE)) == 3
    # It does not write over an earlier hour.
    again = subprocess.run(
        ["bash", EXAMPLES / "first_hour.sh", model], env=os.environ | settings, capture_output=True, check=False
    )
    assert again.returncode == 1
