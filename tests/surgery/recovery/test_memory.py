"""The peak memory of a refit: one block, its moments, and what the spool may hold."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import transformers

from surgery.planning.file import save_plan
from tests.support.plans import planned

if TYPE_CHECKING:
    from pathlib import Path

_MEASURED = """
import sys
from pathlib import Path
import numpy as np
from chanfmt.models.source import ModelSource
from surgery.planning.file import load_plan
from surgery.recovery.options import Refit
from surgery.recovery.refit import refitted
from surgery.recovery.workplace import Workplace

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) << 10

# The first refit imports everything, and the second finds caches filled.
for name in ("small", "large"):
    home = Path(sys.argv[1]) / name
    sequences = int(sys.argv[2]) if name == "large" else 8
    ids = np.random.default_rng(0).integers(0, 500, (sequences, int(sys.argv[3]))).astype(np.int32)
    given = Refit(ids, "cpu", int(sys.argv[4]), sys.argv[5])
    before = status("VmRSS")
    with refitted(load_plan(home / "plan.safetensors"), ModelSource(home / "model"), given, Workplace(home)) as fitted:
        assert fitted.layers
print(status("VmHWM") - before)
"""


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    # It measures, and its bounds were measured on one machine.
    pytest.mark.repeated,
]


def save_models(directory: Path, hidden: int, width: int, layers: int) -> None:
    for name, count in (("small", 1), ("large", layers)):
        config = transformers.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=count,
            num_attention_heads=4,
            vocab_size=500,
        )
        home = directory / name
        transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
        save_plan(planned(home / "model", lambda number, ffn: ffn.width // 2), home / "plan.safetensors")


def peak(directory: Path, sequences: int, length: int, spool_bytes: int, method: str) -> float:
    """Megabytes that the refit of the large model takes."""
    words = [str(directory), str(sequences), str(length), str(spool_bytes), method]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *words], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1e6


def test_one_block_is_in_memory(tmp_path: Path) -> None:
    """Nine more blocks of 20 MB take less than half of their size."""
    found = []
    for layers in (3, 12):
        save_models(tmp_path / str(layers), 512, 2560, layers)
        found.append(peak(tmp_path / str(layers), 8, 32, 0, "lstsq"))
    assert found[1] < found[0] + 90


def test_hidden_states_take_what_the_spool_may_hold(tmp_path: Path) -> None:
    """Two streams of 34 MB each, and 67 MB of activations."""
    save_models(tmp_path, 256, 1024, 2)
    without, some = (peak(tmp_path, 128, 256, limit, "lstsq") for limit in (0, 40_000_000))
    # The heap keeps up to 64 MB of freed memory.
    assert without < 110
    assert some < without + 40 + 30
