"""SIGKILL and Ctrl-C in `surgery prune --recover`: the same command goes on, and ends with the bits of one that nobody stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from surgery.recovery.resume import PartialRefit
from tests.support.builds import build
from tests.support.crash.harness import child, finish
from tests.support.tiny import tiny_tokenizer
from tests.support.zoo import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
LAYERS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers, and its atlas."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny("llama", num_hidden_layers=LAYERS).save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    options = BuildOptions(str(directory / "model"), str(directory / "a.h5"), calib="pydoc", sequences=48, seq_len=64)
    build(options, LabelSettings(rho=0.1, eta=0.2, support_size=8))
    return directory


def arguments(inputs: Path, output: Path, command: str, *more: str) -> list[str]:
    model = ["--model", str(inputs / "model"), "-o", str(output), "--recover", "block", *more]
    if command == "prune":
        return ["prune", str(inputs / "a.h5"), "--sparsity", "0.5", "--multiple-of", "1", *model]
    return ["apply", str(inputs / "plan.safetensors"), "--atlas", str(inputs / "a.h5"), *model]


def surgery(words: list[str]) -> None:
    from surgery.cli.main import main

    code = main(words)
    if code:
        raise SystemExit(code)


def contents(directory: Path) -> dict[str, str]:
    """Digest of each file that does not name a command or a moment."""
    return {
        str(item.relative_to(directory)): hashlib.sha256(item.read_bytes()).hexdigest()
        for item in sorted(directory.rglob("*"))
        if item.is_file() and item.name not in ("surgery.json", "README.md")
    }


def fits(directory: Path) -> object:
    return json.loads((directory / "surgery.json").read_text())["recovery"]


def kill_at(save: int) -> Callable[[], None]:
    """Let this process kill itself when the refit has been saved ``save`` times."""
    left = [save]
    real = PartialRefit.save_if_due

    def killing(self: PartialRefit, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: setattr(PartialRefit, "save_if_due", killing)


@pytest.mark.parametrize("command", ["prune", pytest.param("apply", marks=pytest.mark.repeated)])
def test_kills_at_blocks_and_at_a_random_moment(command: str, inputs: Path, tmp_path: Path) -> None:
    if command == "apply":
        plan = ["plan", str(inputs / "a.h5"), "--sparsity", "0.5", "--multiple-of", "1", "-o", str(inputs / "plan.safetensors")]
        finish(lambda: surgery(plan))
    words = arguments(inputs, tmp_path / "out", command, "--checkpoint-every", "0")
    seconds = finish(lambda: surgery(words))
    expected, layers = contents(tmp_path / "out"), fits(tmp_path / "out")
    finish(lambda: surgery([*words, "--overwrite"]))
    assert contents(tmp_path / "out") == expected, "two processes give different bits"
    shutil.rmtree(tmp_path / "out")

    def kill(prepare: Callable[[], None], after: float | None) -> int:
        pid = child(lambda: (prepare(), surgery(words)))
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def go_on() -> None:
        if not (tmp_path / "out").exists():
            finish(lambda: surgery(words))
        assert contents(tmp_path / "out") == expected
        assert fits(tmp_path / "out") == layers
        shutil.rmtree(tmp_path / "out")

    # Twice in one refit, and at its end.
    for saves in ((1, 3), (LAYERS,)):
        for save in saves:
            assert kill(kill_at(save), None) == -signal.SIGKILL
            assert (tmp_path / "out.partial" / "state.json").is_file()
            assert not (tmp_path / "out").exists()
        go_on()
        assert not list(tmp_path.iterdir())
    chance = random.Random(0)
    # Both commands run the same refit, so one of them is killed at a random moment.
    for _ in range(1 if command == "prune" else 0):
        kill(lambda: None, chance.uniform(0.2, 1) * seconds)
        go_on()
        # A command that was killed behind its end could not remove its refit. The next command does.
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        assert not [item for item in tmp_path.iterdir() if not item.name.endswith((".claim", ".tmp"))]


def test_ctrl_c_says_how_to_go_on(inputs: Path, tmp_path: Path) -> None:
    words = arguments(
        inputs, tmp_path / "out", "prune", "--checkpoint-every", "0", "--recover-tokens", "8k", "--recover-text", "pydoc"
    )
    command = [sys.executable, "-m", "surgery", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "the refit is saved in" in line:
            process.send_signal(signal.SIGINT)
            break
    said += process.stderr.readlines()
    assert process.wait() == 130
    assert re.fullmatch(
        r"surgery: interrupted; .*out\.partial holds the refit of [1-6] FFNs?: run the same command again to continue\n", said[-1]
    ), said
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"continuing the refit at model\.layers\.[1-6]: [1-6] of 6 FFNs are fitted", done.stderr), done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
