"""Each tensor of a checkpoint is loaded, listed as ignorable, or named and refused. Every command says the same of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

import chanfmt
from chanfmt.base.errors import ModelError
from chanfmt.cli.main import main as atlas_main
from chanfmt.models.accounting import account, check_accounted
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.streamed import open_streamed
from surgery.cli.main import main as surgery_main
from tests.support import spoiled, tensor_fuzz, zoo
from tests.support.heard import heard
from tests.support.spoiled import llama, store, stored
from tests.support.tiny import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--calib", "pydoc", "--sequences", "2", "--seq-len", "32", "--quiet"]


def refusal(directory: Path) -> str:
    """What is said of a checkpoint, which must be the same in memory and streamed."""
    said = []
    for open_model in (load_model, open_streamed):
        with pytest.raises(ModelError) as error:
            open_model(ModelSource(directory), device="cpu")
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0]


def arrays(model: Path, output: Path, *, stream: bool = False) -> dict[str, bytes]:
    with chanfmt.build(
        model, output, "pydoc", sequences=2, seq_len=32, batch_size=2, stream=stream, support_size=8, overwrite=True
    ) as atlas:
        return {
            f"{number}/{name}": values.tobytes()
            for number, stack in enumerate(atlas.content().stacks)
            for name, values in stack.variables.items()
        }


@pytest.mark.parametrize("kind", spoiled.REFUSED)
def test_every_command_refuses(kind, tmp_path, capsys, monkeypatch):
    make, sentence = spoiled.REFUSED[kind]
    bad, good, plan, text = (str(tmp_path / name) for name in ("bad", "good", "plan", "text.txt"))
    make(tmp_path / "bad")
    llama(tmp_path / "good")
    (tmp_path / "text.txt").write_text("Some text, long enough to be evaluated. " * 20)
    monkeypatch.chdir(tmp_path)
    assert atlas_main(["build", good, "-o", "a.h5", *SMALL]) == 0
    assert surgery_main(["plan", "a.h5", "--sparsity", "0.5", "-o", plan, "--quiet"]) == 0
    capsys.readouterr()
    for main, arguments in (
        (atlas_main, ["build", bad, "-o", "b.h5", *SMALL]),
        (atlas_main, ["build", bad, "-o", "b.h5", "--stream", *SMALL]),
        (surgery_main, ["prune", "a.h5", "--sparsity", "0.5", "--model", bad, "-o", "out", "--quiet"]),
        (surgery_main, ["apply", plan, "--model", bad, "--fine-tune", "-o", "out", "--quiet"]),
        (surgery_main, ["eval", bad, "--data", text, "--seq-len", "32", "--quiet"]),
    ):
        assert main(arguments) == 2, arguments
        assert sentence in capsys.readouterr().err, arguments
    assert not (tmp_path / "b.h5").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fp8", "surplus bias"])
def test_restore_refuses_what_became_of_a_result(kind, tmp_path, capsys, monkeypatch):
    llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert atlas_main(["build", "model", "-o", "a.h5", *SMALL]) == 0
    assert surgery_main(["prune", "a.h5", "--sparsity", "0.5", "--model", "model", "-o", "small", "--quiet"]) == 0
    tensors = stored(tmp_path / "small")
    name = "model.layers.0.mlp.down_proj"
    if kind == "fp8":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    else:
        tensors[f"{name}.bias"] = torch.ones(tensors[f"{name}.weight"].shape[0])
    store(tmp_path / "small", tensors)
    capsys.readouterr()
    assert surgery_main(["restore", "small", "-o", "back", "--quiet"]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_what_the_class_lists_as_ignorable_is_noted(tmp_path):
    source = ModelSource(spoiled.mtp(tmp_path / "model"))
    with heard() as said:
        accounting = check_accounted(source)
    assert accounting.refused == ()
    assert len(accounting.loaded) + len(accounting.ignored) == len(source.index.tensors)
    assert {group.prefix: (group.like, group.head) for group in accounting.unloaded} == {
        "mtp": ("", False),
        "mtp.layers.0": ("model.layers.3", False),
    }
    count = len(accounting.ignored)
    assert said == [f"Qwen3NextForCausalLM does not load mtp.*: {count} tensors; they are not measured"]


def test_a_layer_after_the_last_that_the_class_lists(tmp_path):
    zoo.tiny("deepseek_v3").save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    last = max(name.split(".")[2] for name in tensors if name.startswith("model.layers."))
    for name in [name for name in tensors if name.startswith(f"model.layers.{last}.")]:
        tensors[name.replace(f"layers.{last}.", "layers.61.")] = tensors[name]
    tensors["model.layers.61.eh_proj.weight"] = torch.randn(zoo.HIDDEN, 2 * zoo.HIDDEN)
    store(tmp_path, tensors)
    accounting = account(ModelSource(tmp_path))
    assert accounting.refused == ()
    assert [(group.prefix, group.like) for group in accounting.unloaded] == [("model.layers.61", f"model.layers.{last}")]
    assert accounting.notes()[0].startswith("DeepseekV3ForCausalLM does not load model.layers.61.*: ")


def test_heads_of_other_classes_are_noted(tmp_path):
    config = transformers.BertConfig(
        vocab_size=110, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    spoiled.edit_config(tmp_path, architectures=["BertForMaskedLM"])
    accounting = account(ModelSource(tmp_path))
    assert accounting.kind == "BertForMaskedLM"
    assert accounting.refused == ()
    assert set(accounting.ignored) == {
        f"{name}.{kind}" for name in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")
    }
    assert all(group.head for group in accounting.unloaded)


def test_a_head_of_another_shape_is_refused(tmp_path):
    llama(tmp_path)
    store(tmp_path, stored(tmp_path) | {"score.weight": torch.randn(2, 7)})
    assert "score.weight, which LlamaForCausalLM has no place for" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.3.mlp.down_proj.weight", (4, 4), "repair num_hidden_layers"),
        ("model.layers.0.self_attn.k_scale", (1,), "unquantised checkpoint"),
        ("model.mtp_layers.0.fc.weight", (4, 4), "speculative decoding"),
        ("medusa_head.0.weight", (4, 4), "speculative decoding"),
        ("vision_tower.patch.weight", (4, 4), "remove the tensor if nothing needs it"),
    ],
)
def test_unknown_tensors_are_named_with_a_way_out(name, shape, words, tmp_path):
    llama(tmp_path)
    store(tmp_path, stored(tmp_path) | {name: torch.randn(shape)})
    said = refusal(tmp_path)
    assert name in said
    assert words in said


def test_one_tensor_under_two_names(tmp_path):
    llama(tmp_path)
    tensors = stored(tmp_path)
    store(tmp_path, tensors | {"layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"]})
    said = refusal(tmp_path)
    assert "holds layers.0.mlp.up_proj.weight and model.layers.0.mlp.up_proj.weight, which are both" in said


def test_a_checkpoint_without_the_prefix_is_loaded(tmp_path):
    llama(tmp_path / "with")
    expected = arrays(tmp_path / "with", tmp_path / "a.h5")
    llama(tmp_path / "without")
    store(tmp_path / "without", {name.removeprefix("model."): tensor for name, tensor in stored(tmp_path / "without").items()})
    assert arrays(tmp_path / "without", tmp_path / "b.h5") == expected


def test_tied_tensors_that_are_stored_twice(tmp_path):
    llama(tmp_path, tie_word_embeddings=True)
    tensors = stored(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    expected = arrays(tmp_path, tmp_path / "a.h5")
    store(tmp_path, tensors | {"lm_head.weight": embedding})
    assert arrays(tmp_path, tmp_path / "b.h5") == expected
    assert arrays(tmp_path, tmp_path / "c.h5", stream=True) == arrays(tmp_path, tmp_path / "d.h5", stream=True)
    store(tmp_path, tensors | {"lm_head.weight": embedding.flip(0)})
    said = refusal(tmp_path)
    assert "lm_head.weight to model.embed_tokens.weight, and the checkpoint holds both with different values" in said
    spoiled.edit_config(tmp_path, tie_word_embeddings=False)
    load_model(ModelSource(tmp_path), device="cpu")


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "codegen", "gpt2", "llama"])
def test_buffers_that_old_files_hold(model_type, tmp_path):
    zoo.tiny(model_type).save_pretrained(tmp_path)
    source = ModelSource(tmp_path)
    expected = account(source)
    stem = next(name for name in expected.loaded if "attn" in name).partition("attn")[0]
    buffers = {
        f"{stem}attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{stem}attn.masked_bias": torch.tensor(-1e9),
        f"{stem}attn.causal_mask": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        f"{stem}attn.rotary_emb.inv_freq": torch.ones(4),
    }
    store(tmp_path, stored(tmp_path) | buffers)
    found = account(ModelSource(tmp_path))
    assert found.refused == ()
    assert found.loaded == expected.loaded
    assert set(found.ignored) == set(buffers)
    assert found.notes() == []
    store(tmp_path, stored(tmp_path) | {f"{stem}attn.bias": torch.ones(8)})
    if model_type != "gpt2":  # GPT2LMHeadModel lists the name, whatever it holds.
        assert f"{stem}attn.bias" in refusal(tmp_path)


def test_experts_with_a_gap_are_not_joined_in_another_order(tmp_path):
    save_tiny(tmp_path, "qwen3_moe", **tensor_fuzz.CASES["qwen3_moe"])
    tensors = stored(tmp_path)
    name = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    tensors[name.format(7)] = tensors.pop(name.format(1))
    store(tmp_path, tensors)
    assert f"lacks {name.format(1)}, and holds {name.format(7)}" in refusal(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_an_expert_under_another_prefix_is_not_joined_last(prefix, tmp_path):
    save_tiny(tmp_path, "qwen3_moe", **tensor_fuzz.CASES["qwen3_moe"])
    tensors = stored(tmp_path)
    name = f"{prefix}layers.1.mlp.experts.1.down_proj.weight"
    tensors[name] = tensors.pop("model.layers.1.mlp.experts.1.down_proj.weight")
    store(tmp_path, tensors)
    assert f"holds {name} under another prefix" in refusal(tmp_path)


def test_the_last_expert_is_missing(tmp_path):
    save_tiny(tmp_path, "qwen3_moe", **tensor_fuzz.CASES["qwen3_moe"])
    tensors = stored(tmp_path)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    del tensors[name]
    store(tmp_path, tensors)
    assert f"lacks {name}" in refusal(tmp_path)


def test_fused_and_split_experts_side_by_side(tmp_path):
    save_tiny(tmp_path, "qwen3_moe", **tensor_fuzz.CASES["qwen3_moe"])
    fused = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    store(tmp_path, stored(tmp_path) | {name: fused[name]})
    assert name in refusal(tmp_path)


def test_a_weight_of_integers(tmp_path):
    llama(tmp_path)
    tensors = stored(tmp_path)
    name = "model.norm.weight"
    store(tmp_path, tensors | {name: tensors[name].to(torch.int64)})
    assert f"stores {name} as I64, and LlamaForCausalLM has floating-point numbers there" in refusal(tmp_path)


def test_an_index_without_metadata(tmp_path, monkeypatch, capsys):
    llama(tmp_path / "clean")
    spoiled.index_without_metadata(tmp_path / "model")
    expected = arrays(tmp_path / "clean", tmp_path / "a.h5")
    assert arrays(tmp_path / "model", tmp_path / "b.h5") == expected
    model = load_model(ModelSource(tmp_path / "model"), device="cpu")
    assert model.config.name_or_path == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert surgery_main(["prune", "b.h5", "--sparsity", "0.5", "--model", "model", "-o", "small", "--quiet"]) == 0
    assert surgery_main(["restore", "small", "-o", "back", "--quiet"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("model_type", ["gpt_neox", "deepseek_v3", "mixtral", "gpt_oss", "t5", "falcon_h1", "phimoe"])
def test_what_save_pretrained_writes_is_loaded(model_type, tmp_path):
    family = zoo.SEQ2SEQ if model_type == "t5" else zoo.CAUSAL
    zoo.tiny(model_type, family).save_pretrained(tmp_path)
    source = ModelSource(tmp_path)
    accounting = account(source)
    assert set(accounting.loaded) == set(source.index.tensors)
    assert accounting.ignored == ()
    assert accounting.refused == ()


def test_random_mistakes():
    """2,000 of them, if ``TENSOR_FUZZ`` says so: ``python -m tests.support.tensor_fuzz 2000``."""
    outcomes, failures = tensor_fuzz.tally(int(os.environ.get("TENSOR_FUZZ", "48")), seed=2)
    assert not failures, "\n".join(failures)
    assert {kind.partition(":")[0] for kind in outcomes} == {mistake.__name__ for mistake in tensor_fuzz.MISTAKES}
