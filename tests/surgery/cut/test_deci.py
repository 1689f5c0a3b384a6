"""A Llama model with a width of its own for every layer: transformers loads it with the file that we wrote, and it computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from chanfmt.base.errors import UsageError
from chanfmt.cli.main import main as atlas_main
from chanfmt.format.reader import Atlas
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.deci import ffn_mult
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.planning.file import load_plan
from surgery.planning.layouts import deci_obstacle, readers
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.what_if import WhatIf
from surgery.result.result import open_result
from tests.support.plans import planned
from tests.support.repeated import repeated
from tests.support.tiny import VOCAB, tiny_tokenizer

if TYPE_CHECKING:
    from surgery.planning.plan import PruningPlan
    from surgery.result.record import Report

KEPT = (96, 160, 224, 32)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY = {"rope_theta": 5000.0, **LLAMA3, "original_max_position_embeddings": 32}


def save_llama(directory: Path, kind: str = "Llama", **fields: Any) -> Path:
    settings = {
        "hidden_size": 48,
        "intermediate_size": 256,
        "num_hidden_layers": len(KEPT),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings | fields)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(directory)
    return directory


def cut(model: Path, out: Path, layout: str = "auto", kept: tuple[int, ...] = KEPT) -> tuple[PruningPlan, Report]:
    plan = planned(model, lambda number, ffn: kept[number])
    return plan, apply_plan(plan, ModelSource(model), out, CutOptions(layout=layout))


def masked(model: Path, plan: PruningPlan) -> Any:
    """The dense model with the removed channels' write vectors set to 0."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    for layer, block in zip(dense.model.layers, plan.blocks, strict=True):
        layer.mlp.down_proj.weight.data[:, torch.from_numpy(block.removed_of(0)).long()] = 0
    return dense


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        *repeated(
            ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
            ("Llama", {"rope_parameters": ROTARY, "num_key_value_heads": 6}),
            ("Mistral", {"sliding_window": None}),
        ),
    ],
)
def test_transformers_alone_loads_the_result_with_equal_logits(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Another process without chanfmt loads, saves and loads again, as a user does."""
    model = save_llama(tmp_path / "model", kind, **fields)
    plan, report = cut(model, tmp_path / "out")
    ids = torch.arange(40)[None] % 61
    torch.save(masked(model, plan)(ids).logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
wanted = torch.load({str(tmp_path / "logits.pt")!r})
ids = torch.arange(40)[None] % 61
for place in ({str(tmp_path / "out")!r}, {str(tmp_path / "again")!r}):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    assert [layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers] == {list(KEPT)}
    assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == {list(KEPT)}
    error = float((model(ids).logits - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5, error
    model.save_pretrained({str(tmp_path / "again")!r})
assert not any(name.split(".")[0] == "chanfmt" for name in sys.modules)
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    assert report.logits is not None
    assert report.logits.relative_error < 1e-4
    assert report.plan.layout == "deci"
    assert not report.padded


def test_the_result_is_smaller_by_what_was_removed(tmp_path: Path) -> None:
    _, report = cut(save_llama(tmp_path / "model"), tmp_path / "out")
    assert report.parameters_before - report.parameters_after == 3 * 48 * sum(256 - width for width in KEPT)
    assert report.sizes.config == ("4 widths of 32 to 224 in block_configs", "model_type llama to nemotron-nas")
    read = open_result(tmp_path / "out")
    assert read.report.sizes == report.sizes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    assert "Stock transformers code loads" not in card


def test_an_even_plan_stays_a_stock_model(tmp_path: Path) -> None:
    _, report = cut(save_llama(tmp_path / "model"), tmp_path / "out", kept=(96,) * 4)
    assert report.plan.layout == "uniform"
    assert not (tmp_path / "out" / "modeling_uneven.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 96


def test_an_even_plan_can_be_laid_out_so_too(tmp_path: Path) -> None:
    _, report = cut(save_llama(tmp_path / "model"), tmp_path / "out", "deci", kept=(96,) * 4)
    assert report.plan.layout == "deci"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "nemotron-nas"


def test_uniform_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would shrink by") as caught:
        cut(save_llama(tmp_path / "model"), tmp_path / "out", "uniform", kept=(256, 96, 96, 96))
    assert "use --layout deci" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("Qwen2", {}, "this model is of the type 'qwen2'"),
        ("Mistral", {"sliding_window": 16}, "knows no sliding window"),
    ],
)
def test_another_model_is_refused_with_the_reason(kind: str, fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", kind, **fields)
    with pytest.raises(UsageError, match=reason):
        cut(model, tmp_path / "out", "deci")
    # By itself, the layout is that of stock code, and such a cut saves nothing.
    with pytest.raises(UsageError, match="would shrink by"):
        cut(model, tmp_path / "out", kept=(256, 96, 96, 96))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    plan = planned(model, lambda number, ffn: KEPT[number])
    config = json.loads((model / "config.json").read_text())
    assert deci_obstacle(plan.blocks, config) == ""
    assert "predicts tokens" in deci_obstacle(plan.blocks, config | {"architectures": ["LlamaForSequenceClassification"]})
    assert "one FFN in each layer" in deci_obstacle(plan.blocks[1:], config)
    assert "does not hold the model's config" in deci_obstacle(plan.blocks, {})


def test_the_result_can_be_cut_again_and_put_back(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    plan, _ = cut(model, tmp_path / "out")
    half = {width: max(16, width // 2) for width in KEPT}
    second = planned(tmp_path / "out", lambda number, ffn: half[ffn.width])
    report = apply_plan(second, ModelSource(tmp_path / "out"), tmp_path / "twice", CutOptions(layout="auto"))
    blocks = json.loads((tmp_path / "twice" / "config.json").read_text())["block_configs"]
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [half[width] for width in KEPT]
    assert report.logits is not None
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.arange(30)[None]
    assert torch.allclose(back(ids).logits, masked(model, plan)(ids).logits, atol=1e-5)


def test_the_plan_in_the_result_says_the_layout(tmp_path: Path) -> None:
    cut(save_llama(tmp_path / "model"), tmp_path / "out")
    assert load_plan(tmp_path / "out" / "kept_channels.safetensors").layout == "deci"


def test_code_in_a_result_is_not_run_when_it_is_read(tmp_path: Path) -> None:
    """Whoever edits the file in a result gets nothing run by reading it: our own copy loads the model."""
    cut(save_llama(tmp_path / "model"), tmp_path / "out")
    for name in ("modeling_uneven.py", "configuration_uneven.py"):
        (tmp_path / "out" / name).write_text("raise SystemExit('the code of the result ran')\n")
    source = ModelSource(tmp_path / "out")
    assert [layer.mlp.down_proj.in_features for layer in load_model(source).model.layers] == list(KEPT)


def nas_width(ratio: float, hidden: int) -> int:
    """The width that programs compute from ``ffn_mult``: two thirds of it times the hidden size, up to a multiple of 256."""
    width = int(2 * ratio * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden", [64, 576, 2048, 2880, 4096, 5120, 8192, 16384])
def test_the_ratio_gives_back_the_width_in_six_digits(hidden: int) -> None:
    for width in range(256, 6 * hidden, 256):
        assert nas_width(ffn_mult(width, hidden), hidden) == nas_width(round(ffn_mult(width, hidden), 6), hidden) == width


def test_multiples_of_256_are_written_so_that_more_programs_read_them(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", intermediate_size=1024)
    kept = (256, 768, 512, 1024)
    _, report = cut(model, tmp_path / "out", kept=kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [nas_width(block["ffn"]["ffn_mult"], 48) for block in config["block_configs"]] == list(kept)
    assert not any("intermediate_size" in block["ffn"] for block in config["block_configs"])
    assert report.logits is not None
    assert readers(config, kept) == (["vLLM", "SGLang", "TensorRT-LLM", "mlx-lm"], "")
    assert readers(config | {"head_dim": 12}, kept)[0] == ["vLLM", "SGLang", "TensorRT-LLM"]
    assert readers(config | {"mlp_bias": True}, kept)[0] == ["vLLM", "mlx-lm"]
    assert readers(config | {"hidden_act": "gelu_pytorch_tanh"}, kept)[0] == ["vLLM", "SGLang", "TensorRT-LLM"]
    assert readers(config, KEPT)[0] == ["vLLM"]


def test_plans_say_beforehand_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_llama(tmp_path / "model", vocab_size=VOCAB)
    tiny_tokenizer().save_pretrained(model)
    atlas, out = str(tmp_path / "a.h5"), str(tmp_path / "out")
    assert atlas_main(["build", str(model), "-o", atlas, "--calib", "pydoc", "--sequences", "2", "--seq-len", "32"]) == 0
    capsys.readouterr()
    asked = [atlas, "--to", "75%", "--allocation", "global", "--method", "magnitude", "--multiple-of", "16"]
    said = []
    for command in (["plan", *asked], ["prune", *asked, "--dry-run"], ["prune", *asked, "--model", str(model), "-o", out]):
        assert main(command) == 0
        printed = capsys.readouterr()
        said.append([line for line in printed.out.splitlines() if line.startswith(("parameters", "size", "config", "layout"))])
        assert "trust_remote_code=True" in printed.err
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 4
    assert "in block_configs, model_type llama to nemotron-nas" in said[0][2]
    before, after = (ModelSource(place).index.parameters for place in (model, tmp_path / "out"))
    assert 0.7 * before < after <= 0.75 * before
    # The what-if of the browser says the same.
    with Atlas.open(Path(atlas)) as opened:
        options = PlanOptions(0.5, "magnitude", allocation="global", multiple_of=16)
        what_if = WhatIf(opened, options)
        rows = what_if.at(0.5)
        sizes = what_if.sizes(rows)
        assert sizes == make_plan(opened, options).sizes
        assert sizes is not None
        assert "block_configs" in sizes.headline
        assert not what_if.is_refused(rows)
        padded = WhatIf(opened, replace(options, layout="uniform"))
        assert padded.sizes(padded.at(0.5)).config[0].startswith("intermediate_size 256 to ")
    # The same plan in another layout.
    assert main(["plan", *asked, "-o", str(tmp_path / "plan")]) == 0
    apply = ["apply", str(tmp_path / "plan"), "--model", str(model), "-o", str(tmp_path / "padded"), "--layout", "uniform"]
    assert main([*apply, "--allow-padding"]) == 0
    assert not (tmp_path / "padded" / "modeling_uneven.py").exists()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    # Equal widths are not called uneven.
    capsys.readouterr()
    assert main(["plan", atlas, "--sparsity", "0.5", "--layout", "deci"]) == 0
    said = capsys.readouterr().err
    assert "laid out as DeciLM" in said
    assert "uneven" not in said
    # Such a result can be cut again, and the build that precedes the cut does not say otherwise.
    again = str(tmp_path / "again.h5")
    assert atlas_main(["build", out, "-o", again, "--calib", "pydoc", "--sequences", "2", "--seq-len", "32"]) == 0
    assert "will refuse" not in capsys.readouterr().err
    assert main(["plan", again, "--sparsity", "0.3", "--multiple-of", "8"]) == 0
    assert "would refuse" not in capsys.readouterr().err


@pytest.mark.parametrize("recover", ["bias", "lstsq"])
def test_a_recovery_is_written_into_it(recover: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias is a switch of the config, and refitted weights are put in where the kept channels are."""
    model = save_llama(tmp_path / "model", vocab_size=VOCAB)
    tiny_tokenizer().save_pretrained(model)
    atlas, out = str(tmp_path / "a.h5"), str(tmp_path / "out")
    assert atlas_main(["build", str(model), "-o", atlas, "--calib", "pydoc", "--sequences", "8", "--seq-len", "64"]) == 0
    asked = [atlas, "--sparsity", "0.5", "--layers", "0,2", "--method", "magnitude", "--recover", recover]
    assert main(["prune", *asked, "--model", str(model), "-o", out]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    result = load_model(ModelSource(tmp_path / "out"))
    assert [layer.mlp.down_proj.in_features for layer in result.model.layers] == [128, 256, 128, 256]
    assert (result.model.layers[0].mlp.down_proj.bias is not None) is (recover == "bias")


def test_mlx_lm_computes_the_same_logits(tmp_path: Path) -> None:
    """The scaling of positions is in fields that mlx-lm reads, too: without it, these logits differ by 5e-3."""
    mlx = pytest.importorskip("mlx.core", exc_type=ImportError)
    utils = pytest.importorskip("mlx_lm.utils", exc_type=ImportError)
    model = save_llama(tmp_path / "model", intermediate_size=1024, rope_parameters=ROTARY)
    plan, _ = cut(model, tmp_path / "out", kept=(256, 768, 512, 1024))
    ids = torch.arange(40)[None] % 61
    wanted = masked(model, plan)(ids).logits.detach()
    loaded, _ = utils.load_model(tmp_path / "out")
    found = torch.tensor(loaded(mlx.array(ids.tolist())).tolist())
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
