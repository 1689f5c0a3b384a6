"""Causal language models of several types with widths of their own for their FFNs: transformers loads them with our modelling file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import HF_MODULES_CACHE

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.classes import auto_class
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.planning.file import load_plan
from surgery.result.result import open_result
from tests.support.plans import planned
from tests.support.repeated import repeated

VOCAB = 61
KEPT = (96, 32, 64)
COMMON = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2ForCausalLM", {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Gemma3Text": ("Gemma3ForCausalLM", {**COMMON, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 16}),
    "GPTNeoX": ("GPTNeoXForCausalLM", COMMON),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}),
    "Olmo2": ("Olmo2ForCausalLM", {**COMMON, "num_key_value_heads": 2}),
    "Mixtral": ("MixtralForCausalLM", {**COMMON, "num_key_value_heads": 2, "num_local_experts": 4}),
    "Phi3": ("Phi3ForCausalLM", {**COMMON, "num_key_value_heads": 2, "pad_token_id": 0}),
    "OPT": ("OPTForCausalLM", {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 48, "max_position_embeddings": 64}),
}

EACH = {"Qwen2": 144, "Gemma3Text": 144, "GPTNeoX": 97, "GPT2": 65, "Olmo2": 144, "Mixtral": 4 * 144, "Phi3": 144, "OPT": 97}
"""Parameters of a channel: its rows in the reads, their biases, its write vector; of all experts."""


def saved(kind: str, directory: Path) -> Path:
    name, fields = MODELS[kind]
    torch.manual_seed(0)
    getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**fields)).save_pretrained(directory)
    return directory


def cut(model: Path, out: Path, layout: str = "custom", kept: tuple[int, ...] = KEPT, **options: Any) -> Any:
    plan = planned(model, lambda number, ffn: kept[number])
    return plan, apply_plan(plan, ModelSource(model), out, CutOptions(layout=layout, **options))


IDS = torch.arange(40)[None] % VOCAB
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(40)[None] % 61
for kind in sys.argv[1:]:
    wanted = torch.load(f"{kind}/logits.pt")
    for place in (f"{kind}/narrowed", f"{kind}/again"):
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
        error = float((model(ids).logits - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, (place, error)
        model.save_pretrained(f"{kind}/again")
    if kind != sys.argv[-1]:
        continue
    assert model.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    try:
        AutoModelForCausalLM.from_pretrained(f"{kind}/narrowed")
    except RuntimeError as error:
        assert "size" in str(error), error
    else:
        raise AssertionError("without the code, the stock class loaded the result")
assert not any(name.split(".")[0] in ("chanfmt", "surgery") for name in sys.modules)
"""


@pytest.mark.parametrize("kinds", [("Qwen2", "GPTNeoX", "GPT2"), *repeated((("Gemma3Text", "Olmo2", "Mixtral", "Phi3", "OPT"),))])
def test_transformers_alone_loads_the_results_with_the_logits_of_the_padded_ones(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Another process without our packages loads, saves and loads again, as a user does."""
    for kind in kinds:
        model = saved(kind, tmp_path / kind / "model")
        plan, report = cut(model, tmp_path / kind / "narrowed")
        # Nothing of the check is left in the cache of transformers, which other tests use at the same time.
        assert not list(Path(HF_MODULES_CACHE).rglob("*narrowed_dot*"))
        assert report.plan.layout == "custom"
        assert report.logits.relative_error < 1e-4
        assert not report.padded
        removed = sum(128 - width for width in KEPT)
        assert report.parameters_before - report.parameters_after == removed * EACH[kind]
        apply_plan(
            plan, ModelSource(model), tmp_path / kind / "padded", CutOptions(verify=False, layout="uniform", allow_padding=True)
        )
        padded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "padded").eval()
        torch.save(padded(IDS).logits, tmp_path / kind / "logits.pt")
    environment = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", SCRIPT, *kinds], check=True, env=environment, cwd=tmp_path)


def test_the_result_says_its_widths_and_what_it_needs(tmp_path: Path) -> None:
    _, report = cut(saved("GPTNeoX", tmp_path / "model"), tmp_path / "out")
    assert report.sizes.config == ("2 widths of 32 to 64 in narrowed_ffns", "intermediate_size 128 to 96")
    assert open_result(tmp_path / "out").report.sizes == report.sizes
    assert load_plan(tmp_path / "out" / "kept_channels.safetensors").layout == "custom"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gpt_neox"
    assert config["narrowed_ffns"][0] == {"module": "gpt_neox.layers.1.mlp", "fields": {"intermediate_size": 32}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    assert "Stock transformers code loads" not in card


def test_code_in_a_result_is_not_run_when_it_is_read_or_put_back(tmp_path: Path) -> None:
    model = saved("GPT2", tmp_path / "model")
    cut(model, tmp_path / "out")
    (tmp_path / "out" / "modeling_narrowed.py").write_text("raise SystemExit('the code of the result ran')\n")
    loaded = load_model(ModelSource(tmp_path / "out"))
    assert [layer.mlp.c_proj.nx for layer in loaded.transformer.h] == list(KEPT)
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.allclose(back(IDS).logits, loaded(IDS).logits, atol=1e-5)
    # It is not cut twice, and a class that is not there is named.
    with pytest.raises(UsageError, match="cannot be cut again"):
        cut(tmp_path / "out", tmp_path / "twice", "auto", kept=(48, 16, 32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = "NothingForCausalLM"
    config |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"modeling_narrowed.{name}"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no such class"):
        auto_class(ModelSource(tmp_path / "out").config)


def test_other_models_are_refused_with_the_reason_and_auto_names_the_layout(tmp_path: Path) -> None:
    model = saved("Olmo2", tmp_path / "model")
    with pytest.raises(UsageError, match="would shrink by") as caught:
        cut(model, tmp_path / "out", "auto", kept=(128, 32, 32))
    assert "use --layout custom" in str(caught.value.hint)
    with pytest.raises(UsageError, match="deci is not possible") as caught:
        cut(model, tmp_path / "out", "deci")
    assert "use --layout custom" in str(caught.value.hint)
    with pytest.raises(UsageError, match="custom is for checkpoints"):
        CutOptions(layout="custom", format="gguf").check()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Olmo2Model"]}))
    with pytest.raises(UsageError, match="without a head that predicts"):
        cut(model, tmp_path / "out")
