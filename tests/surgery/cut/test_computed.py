"""The logits of a checkpoint, block by block and in memory."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from chanfmt.base.errors import CheckError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.check import NotCheckedError, check_logits
from surgery.cut.computed import Computation, Mask
from surgery.cut.inputs import check_inputs
from surgery.cut.options import CutOptions
from tests.support import zoo
from tests.support.plans import planned

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

STREAMED = (
    ("llama", "causal"),
    ("gpt2", "causal"),  # transposed, tied
    ("phi3", "causal"),  # fused
    ("mixtral", "causal"),  # experts
    ("qwen2_moe", "causal"),  # experts and a shared expert
    ("gemma2", "causal"),  # norms around the FFN
    ("falcon", "causal"),  # parallel
    ("gemma3n_text", "causal"),  # blocks that read embeddings of their own
    ("llama4_text", "causal"),  # moves token ids to the device of the embeddings
    ("opt", "causal"),
    ("bert", "masked"),
    ("t5", "seq2seq"),
    ("bart", "seq2seq"),
    ("vit", "image"),
    ("whisper", "speech"),
)
WHOLE = (
    ("zamba", "causal"),  # blocks share weights
    ("marian", "seq2seq"),  # from_pretrained computes weights that the checkpoint lacks
)


def saved(model_type: str, family: str, directory: Path) -> Path:
    zoo.tiny(model_type, family).save_pretrained(directory)
    return directory


def halved(directory: Path) -> PruningPlan:
    return planned(directory, lambda number, ffn: max(1, ffn.width // 2))


def plenty(needed: int, what: str) -> None:
    assert needed > 0


def computation(directory: Path, mask: Mask | None = None, **options: Any) -> Computation:
    return Computation(ModelSource(directory), torch.float32, lambda model: check_inputs(model, (), 0), mask, **options)


@pytest.mark.parametrize(("model_type", "family"), STREAMED)
def test_block_by_block_is_in_memory(model_type: str, family: str, tmp_path: Path) -> None:
    """With channels masked and without, and the masked channels make a difference."""
    model = saved(model_type, family, tmp_path / "model")
    whole = computation(model).run_in_memory(plenty)
    streamed = computation(model).run(plenty)
    assert streamed.streamed
    assert not whole.streamed
    torch.testing.assert_close(streamed.output, whole.output, rtol=0, atol=1e-6 * float(whole.output.abs().max()))
    assert streamed.ties == whole.ties
    mask = Mask(halved(model).blocks, {})
    if model_type == "gemma3n_text":
        for run in (computation(model, mask).run, computation(model, mask).run_in_memory):
            with pytest.raises(CheckError, match="from all its channels"):
                run(plenty)
        return
    masked = computation(model, mask).run_in_memory(plenty).output
    found = computation(model, mask).run(plenty)
    assert found.streamed
    torch.testing.assert_close(found.output, masked, rtol=0, atol=1e-6 * float(masked.abs().max()))
    assert float((masked - whole.output).abs().max()) > 1e-3 * float(masked.abs().max())


@pytest.mark.parametrize(("model_type", "family"), WHOLE)
def test_what_does_not_run_block_by_block_runs_in_memory(
    model_type: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(model_type, family, tmp_path / "model")
    plan = halved(model)
    assert not computation(model, Mask(plan.blocks, {})).run(plenty).streamed
    report = apply_plan(plan, ModelSource(model), tmp_path / "out")
    assert report.logits is not None
    assert report.logits.relative_error <= 1e-4
    monkeypatch.setattr("surgery.cut.check.available_memory", lambda: 512 << 20)
    with pytest.raises(NotCheckedError, match="for the whole model in float32, and"):
        check_logits(plan, ModelSource(model), ModelSource(tmp_path / "out"))


def test_buffers_that_no_file_holds_are_computed_with_the_weights(tmp_path: Path) -> None:
    zoo.tiny("ibert", "masked", max_position_embeddings=160).save_pretrained(tmp_path)
    found = computation(tmp_path, Mask(halved(tmp_path).blocks, {})).run(plenty)
    assert not found.streamed
    assert torch.isfinite(found.output).all()


def test_an_ffn_that_the_model_lacks(tmp_path: Path) -> None:
    """The other model has the same modules with other widths."""
    plan = halved(saved("llama", "causal", tmp_path / "model"))
    config = zoo.tiny_config("llama")
    config.intermediate_size += 1
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckError, match=r"the model has no FFN model\.layers\.0\.mlp of 44 channels"):
        computation(tmp_path / "other", Mask(plan.blocks, {})).run(plenty)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "zamba"])
def test_weights_are_rounded_before_they_are_used(model_type: str, tmp_path: Path) -> None:
    model = zoo.tiny(model_type)
    model.save_pretrained(tmp_path / "single")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    stored = computation(tmp_path / "half").run(plenty).output
    rounded = computation(tmp_path / "single", rounded=torch.bfloat16).run(plenty).output
    assert torch.equal(stored, rounded)
    assert not torch.equal(stored, computation(tmp_path / "single").run(plenty).output)


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    """A tensor of another shape is noticed block by block, as ``from_pretrained`` would notice it."""
    model = saved("llama", "causal", tmp_path / "model")
    plan = halved(model)
    apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(verify=False))
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"intermediate_size": 22', '"intermediate_size": 23'))
    with pytest.raises(CheckError, match="stock transformers cannot load"):
        check_logits(plan, ModelSource(model), ModelSource(tmp_path / "out"))


_MEASURED = """
import sys
from pathlib import Path
from chanfmt.models.source import ModelSource
from surgery.cut.check import check_logits
from surgery.planning.file import load_plan

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) << 10

# The first check imports everything, and the second finds caches filled.
for name in ("small", "large"):
    home = Path(sys.argv[1]) / name
    before = status("VmRSS")
    check = check_logits(load_plan(home / "plan.safetensors"), ModelSource(home / "model"), ModelSource(home / "out"))
    assert check.dtype == "float32", check
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_check_takes_the_memory_of_one_block(tmp_path: Path) -> None:
    """Twelve blocks of 20 MB. In memory, both models took 240 MB, one after the other."""
    from surgery.planning.file import save_plan

    for name, layers in (("small", 1), ("large", 12)):
        config = transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=2560,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=500,
            tie_word_embeddings=False,
        )
        home = tmp_path / name
        transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
        plan = halved(home / "model")
        save_plan(plan, home / "plan.safetensors")
        apply_plan(plan, ModelSource(home / "model"), home / "out", CutOptions(verify=False))
    done = subprocess.run([sys.executable, "-c", _MEASURED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    block = 4 * (3 * 512 * 2560 + 4 * 512 * 512)
    grown = int(done.stdout)
    assert grown < 2.5 * block, f"{grown / 1e6:.0f} MB for a block of {block / 1e6:.0f} MB"
