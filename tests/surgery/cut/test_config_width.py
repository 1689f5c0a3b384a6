"""The config field that holds the FFN width is found by trial; a model without such a field is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.safetensors import CheckpointIndex
from surgery.cut.config_width import find_layout, narrow_config
from surgery.cut.stock import meta_shapes
from surgery.planning.plan import BlockPlan, PruningPlan
from tests.support.cut_models import FAMILIES, save_model
from tests.support.plans import plan_of

if TYPE_CHECKING:
    from pathlib import Path


def planned(name: str, kept: int) -> PruningPlan:
    family = FAMILIES[name]
    plan = plan_of(*(block.tensors for block in family.blocks()), kept=np.arange(kept, dtype=np.int32), width=family.width)
    assert isinstance(plan.blocks[0], BlockPlan)
    return plan


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_field_is_found_and_moves_what_it_should(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    index = CheckpointIndex.open(save_model(name, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    plan = planned(name, 19)
    before = meta_shapes(config)
    layout = find_layout(plan, config, index)
    assert {field: change.after for field, change in layout.fields.items()} == {family.field: 19}
    assert layout.fields[family.field].before == config[family.field]
    after = meta_shapes(layout.config)
    assert layout.allowed == {key: {shape} for key, shape in after.items()}
    assert sum(before[key] != after[key] for key in before) == len(layout.cuts)
    assert {key for key in layout.config if layout.config[key] != config.get(key)} == {family.field}


def narrow(model: Any, old: int, new: int, suffixes: tuple[str, ...]) -> dict[str, int]:
    """Narrow the axes of length ``old`` in every parameter whose name ends with one of ``suffixes``."""
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    before = meta_shapes(config)
    wanted = {
        name: tuple(new if length == old else length for length in shape) if name.endswith(suffixes) else shape
        for name, shape in before.items()
    }
    assert wanted != before
    plan = plan_of((), kept=np.arange(new, dtype=np.int32), width=old)
    allowed = {name: frozenset({shape}) for name, shape in wanted.items()}
    fields = narrow_config(config, before, allowed, plan, {"layer.0": new})[1]
    assert all(change.before in (old, None) for change in fields.values())
    return {name: change.after for name, change in fields.items()}


def test_a_hard_coded_width_is_refused() -> None:
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=53, hidden_size=20, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="no config field of the model type 'bloom'"):
        narrow(model, 80, 41, ("h_to_4h.weight", "h_to_4h.bias", "4h_to_h.weight"))


def test_a_field_that_moves_more_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=37
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ModelError, match="'llama'"):
        narrow(model, 37, 19, ("0.mlp.up_proj.weight", "0.mlp.gate_proj.weight", "0.mlp.down_proj.weight"))


def test_a_width_that_other_quantities_share() -> None:
    """Vocabulary and context have the FFN's width too; only the right field is taken."""
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=37,
        max_position_embeddings=37,
    )
    fields = narrow(transformers.LlamaForCausalLM(config), 37, 19, ("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
    assert fields == {"intermediate_size": 19}


def test_two_fields_in_one_model() -> None:
    """Encoder and decoder widths are separate fields; both are needed."""
    config = transformers.BartConfig(
        vocab_size=53,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=41,
    )
    fields = narrow(transformers.BartForConditionalGeneration(config), 37, 19, ("fc1.weight", "fc1.bias", "fc2.weight"))
    assert fields == {"encoder_ffn_dim": 19, "decoder_ffn_dim": 19}


def test_a_field_in_a_nested_config() -> None:
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 53,
            "hidden_size": 24,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
        },
        vision_config={
            "hidden_size": 20,
            "intermediate_size": 41,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    fields = narrow(
        transformers.Gemma3ForConditionalGeneration(config), 37, 19, ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    )
    assert fields == {"text_config.intermediate_size": 19}


@pytest.mark.parametrize("config", [{}, {"model_type": 3}, {"model_type": "unheard-of"}])
def test_unknown_model_types(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="does not know the model type"):
        meta_shapes(config)


def test_architectures_are_names_of_models_only() -> None:
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=37
    ).to_dict()
    expected = meta_shapes(config | {"architectures": ["LlamaForCausalLM"]})
    assert meta_shapes(config | {"architectures": None}) == expected
    base = {name.removeprefix("model."): shape for name, shape in expected.items() if name != "lm_head.weight"}
    for names in (["logging"], [3], ["AutoTokenizer"], ["PreTrainedConfig"]):
        assert meta_shapes(config | {"architectures": names}) == base
