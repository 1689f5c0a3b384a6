"""--dtype: every floating tensor of the result is rounded once, and sizes, config and checks follow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.checkpoint import reader
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.recovery.options import BiasRecovery, Refit
from surgery.result.result import open_result
from tests.support.after import VOCABULARY, edit_json, half_plan, legacy_gpt2, llama, put, tensors

if TYPE_CHECKING:
    from pathlib import Path

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("chunk", [8 << 20, 64])
def test_as_torch_rounds(stored: str, dtype: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the parts in which tensors are copied."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    model = llama(tmp_path / "model")
    values = {name: value.to(getattr(torch, stored)) for name, value in tensors(model).items()}
    put(model, values | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4)})
    plan = half_plan(model)
    plain = apply_plan(plan, ModelSource(model), tmp_path / "plain", CutOptions(verify=False))
    report = apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(dtype=dtype))
    assert report.logits is not None
    assert report.logits.relative_error <= 1e-5
    expected = {
        name: value.to(TORCH[dtype]) if value.is_floating_point() else value
        for name, value in tensors(tmp_path / "plain").items()
    }
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) and value.dtype == expected[name].dtype for name, value in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert report.bytes_after == sum(value.nbytes for value in expected.values())
    assert plain.parameters_after == report.parameters_after
    assert f"rounded to {dtype}" in (tmp_path / "out" / "README.md").read_text()
    assert open_result(tmp_path / "out").report.to_json() == report.to_json()


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(dtype="bfloat16", shard_bytes=9000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    result = ModelSource(tmp_path / "out")
    assert index["metadata"]["total_size"] == result.index.nbytes
    assert {entry.dtype for entry in result.index.tensors.values()} == {"BF16"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    restore(result, tmp_path / "wide")
    assert {entry.dtype for entry in ModelSource(tmp_path / "wide").index.tensors.values()} == {"BF16"}


def test_a_restored_model_is_rounded_too(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    apply_plan(half_plan(model), ModelSource(model), tmp_path / "out")
    assert main(["restore", str(tmp_path / "out"), "-o", str(tmp_path / "wide"), "--dtype", "float16", "--quiet"]) == 0
    assert {entry.dtype for entry in ModelSource(tmp_path / "wide").index.tensors.values()} == {"F16"}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float16"
    assert main(["restore", str(tmp_path / "out"), "-o", str(tmp_path / "no"), "--dtype", "half"]) == 2


def test_the_old_name_of_the_field(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(dtype="float16"))
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert edited["torch_dtype"] == "float16"
    assert "dtype" not in edited


def test_a_number_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    values = tensors(model)
    values["model.layers.1.self_attn.q_proj.weight"][3, 5] = 70000.0
    put(model, values)
    with pytest.raises(
        ModelError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' holds numbers that are too large"
    ) as caught:
        apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(dtype="float16"))
    assert "bfloat16" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_refit_is_rounded_once(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    plan = half_plan(model)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (6, 24)).astype(np.int32)
    whole = apply_plan(plan, ModelSource(model), tmp_path / "whole", recovery=Refit(tokens, "cpu", 1 << 30))
    half = apply_plan(
        plan, ModelSource(model), tmp_path / "half", CutOptions(dtype="bfloat16"), recovery=Refit(tokens, "cpu", 1 << 30)
    )
    assert whole.recovery is not None
    assert half.recovery is not None
    assert half.recovery.logit_error is not None
    # The first FFN is fitted before any rounding reaches the fit.
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(tensors(tmp_path / "half")[name], tensors(tmp_path / "whole")[name].bfloat16())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_new_and_old_biases_are_rounded(kind: str, tmp_path: Path) -> None:
    model = {"llama": llama, "gpt2": legacy_gpt2}[kind](tmp_path / "model")
    plan = half_plan(model)
    means = {block.name: np.linspace(0.1, 0.7, block.n_channels) for block in plan.blocks}
    report = apply_plan(
        plan, ModelSource(model), tmp_path / "out", CutOptions(dtype="bfloat16"), recovery=BiasRecovery(means, 99)
    )
    assert report.recovery is not None
    assert report.recovery.logit_error is not None
    assert report.recovery.logit_error <= 1e-4
    assert {entry.dtype for entry in ModelSource(tmp_path / "out").index.tensors.values()} == {"BF16"}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(tmp_path / "model")
    half_plan(model, tmp_path / "plan")
    line = ["apply", str(tmp_path / "plan"), "--model", str(model), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*line, "--dtype", "int8"]) == 2
    assert "choose from float32, bfloat16, float16" in capsys.readouterr().err
    assert main([*line, "--dtype", "bfloat16"]) == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown dtype"):
        CutOptions(dtype="half").check()


def test_from_python(tmp_path: Path) -> None:
    import surgery

    model = llama(tmp_path / "model")
    edit_json(model / "config.json", note=1)
    plan = half_plan(model)
    surgery.apply(plan, model, tmp_path / "out", dtype=torch.float16)  # type: ignore[arg-type]
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.float16}
