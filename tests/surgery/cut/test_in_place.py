"""A model cut in memory is the model that is cut on disk: its tensors bit by bit, its config, its logits."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.run import eager_experts
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.in_place import prune_
from surgery.cut.options import CutOptions
from tests.support import zoo
from tests.support.cut_models import save_model
from tests.support.plans import planned, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

LAYOUTS = (
    ("llama", "causal"),
    ("gpt2", "causal"),
    ("opt", "causal"),
    ("phi3", "causal"),
    ("gpt_neox", "causal"),
    ("mixtral", "causal"),
    ("qwen2_moe", "causal"),
    ("gpt_oss", "causal"),
    ("granitemoe", "causal"),
    ("dbrx", "causal"),
    ("bloom", "causal"),
    ("bert", "masked"),
    ("albert", "masked"),
    ("t5", "seq2seq"),
    ("vit", "image"),
)
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (2, 11)))


def half(number: int, ffn: Any) -> int:
    return int(ffn.width // 2)


def uneven(number: int, ffn: Any) -> int:
    return int(max(1, ffn.width * (0.3 + 0.2 * (number % 3))))


def loaded(directory: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    return getattr(transformers, config.architectures[0]).from_pretrained(directory)


def logits(model: Any) -> torch.Tensor:
    model = model.eval()
    # The grouped products of torch need widths that are multiples of 16 bytes.
    with torch.no_grad(), eager_experts(model):
        if model.main_input_name == "pixel_values":
            size = model.config.image_size
            return model(torch.ones(1, 3, size, size)).logits
        extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **extra).logits


def check_same(model: Any, plan: PruningPlan, source: Path, tmp_path: Path) -> None:
    """``model``, cut, saved and loaded again, against the directory that ``apply_plan`` writes."""
    report = apply_plan(plan, ModelSource(source), tmp_path / "out", CutOptions(verify=False, allow_padding=True))
    model.save_pretrained(tmp_path / "saved")
    found, expected = read(tmp_path / "saved"), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    on_disk = loaded(tmp_path / "out")
    again, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(on_disk))
    assert torch.equal(logits(model), logits(on_disk))
    saved, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "out"))
    for field in report.applied.config:
        *path, last = field.split(".")
        for name in path:
            saved, written = saved[name], written[name]
        assert saved[last] == written[last]


@pytest.mark.parametrize("keep", [half, uneven])
@pytest.mark.parametrize(("model_type", "family"), LAYOUTS)
def test_a_cut_in_memory_is_the_cut_on_disk(
    model_type: str, family: str, keep: Callable[[int, Any], int], tmp_path: Path
) -> None:
    zoo.tiny(model_type, family).save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", keep)
    model = loaded(tmp_path / "model")
    before = sum(parameter.numel() for parameter in model.parameters())
    done = prune_(model, plan, allow_padding=model_type == "bloom")
    assert done.ffns == len(plan.blocks)
    assert (done.channels_before, done.channels_after) == (plan.channels, plan.channels_kept)
    assert done.parameters_before == before
    assert done.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert (done.parameters_after < before) == bool(done.config)
    check_same(model, plan, tmp_path / "model", tmp_path)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt2-inner", "opt", "bert"])
def test_biases_and_ties(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "model")
    plan = planned(tmp_path / "model", half)
    model = loaded(tmp_path / "model")
    prune_(model, plan)
    if name == "llama-tied":
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    check_same(model, plan, tmp_path / "model", tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_stays_of_a_model_in_training(llama: Path) -> None:
    model = loaded(llama).to(torch.bfloat16)
    plan = planned(llama, half)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    parameters = list(model.parameters())
    norm = model.model.norm.weight.clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    prune_(model, plan)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.norm.weight, norm)
    mlp = model.model.layers[1].mlp
    width = plan.blocks[1].n_kept
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features, mlp.intermediate_size) == (width, width, width)
    assert model.config.intermediate_size == width
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert mlp.up_proj.weight.grad.shape == (width, model.config.hidden_size)


def test_a_head_of_another_kind(llama: Path, tmp_path: Path) -> None:
    """A classifier on top has FFNs of the same names."""
    model = transformers.LlamaForSequenceClassification.from_pretrained(llama, pad_token_id=0)
    plan = planned(llama, half)
    prune_(model, plan)
    model.save_pretrained(tmp_path / "saved")
    again, info = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert again.config.intermediate_size == plan.blocks[0].n_kept


def test_a_base_model_without_its_head(llama: Path) -> None:
    """Its parameters lack the prefix of the plan's."""
    plan = planned(llama, half)
    base, whole = transformers.AutoModel.from_pretrained(llama).eval(), loaded(llama)
    prune_(base, plan)
    prune_(whole, plan)
    assert base.layers[0].mlp.up_proj.weight.shape[0] == plan.blocks[0].n_kept
    with torch.inference_mode():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(model: Any, plan: PruningPlan, message: str) -> None:
    before = state(model), model.config.to_json_string()
    with pytest.raises(ModelError, match=message):
        prune_(model, plan)
    assert model.config.to_json_string() == before[1]
    after = state(model)
    assert after.keys() == before[0].keys()
    assert all(value.is_meta or torch.equal(value, before[0][name]) for name, value in after.items())


def test_other_models_are_refused_unchanged(llama: Path, tmp_path: Path) -> None:
    plan = planned(llama, half)
    gpt2 = zoo.tiny("gpt2", "causal")
    refused(gpt2, plan, "is a 'gpt2' model")
    config = transformers.AutoConfig.from_pretrained(llama)
    config.intermediate_size += 4
    refused(transformers.AutoModelForCausalLM.from_config(config), plan, "no FFN model.layers.0.mlp of")
    config = transformers.AutoConfig.from_pretrained(llama)
    config.num_hidden_layers += 1
    refused(transformers.AutoModelForCausalLM.from_config(config), plan, "has 3 FFNs, and the plan is for a model of 2")
    with torch.device("meta"):
        refused(transformers.AutoModelForCausalLM.from_config(config), plan, "meta device")
    model = loaded(llama)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantised"):
        prune_(model, plan)
    with pytest.raises(ModelError, match="not a transformers model"):
        prune_(torch.nn.Linear(2, 2), plan)


def test_a_model_that_was_cut_already_is_refused(llama: Path) -> None:
    plan = planned(llama, half)
    model = loaded(llama)
    prune_(model, plan)
    refused(model, plan, "no FFN model.layers.0.mlp of")


def test_parts_that_the_plan_does_not_know_are_refused(llama: Path) -> None:
    plan = planned(llama, half)
    model = loaded(llama)
    model.model.layers[1].extra = torch.nn.Linear(2, 2)
    refused(model, plan, "is not as its config says: model.layers.1.extra")
    tensors = tuple(dataclasses.replace(item, parameter=item.parameter + "x") for item in plan.blocks[0].tensors)
    wrong = dataclasses.replace(plan, blocks=(dataclasses.replace(plan.blocks[0], tensors=tensors), *plan.blocks[1:]))
    refused(loaded(llama), wrong, "are not those that the plan names")


def test_numbers_made_of_all_channels_are_refused(tmp_path: Path) -> None:
    zoo.tiny("gemma3n_text", "causal").save_pretrained(tmp_path / "model")
    refused(loaded(tmp_path / "model"), planned(tmp_path / "model", half), "from all its channels")
