"""The config field that holds the FFN width is found by trial; an FFN without such a field has none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.stock import meta_shapes
from chanfmt.models.stored.layout import tensor_slices
from chanfmt.models.widths import Placed, WidthField, channel_parameters, edit_config, width_fields
from surgery.cut.inputs import check_inputs
from tests.support import zoo
from tests.support.cut_models import FAMILIES, save_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

LLAMA = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
}


def placed(model: PreTrainedModel, directory: Path) -> tuple[list[Placed], CheckpointIndex, dict[str, Any]]:
    """The FFNs of ``model``, its checkpoint and its config, after it was saved to ``directory``."""
    model.eval().save_pretrained(directory)
    index = CheckpointIndex.open(directory)
    ffns = [
        Placed(ffn.layer_index, ffn.width, ffn.experts, tensor_slices(model, ffn, index))
        for ffn in check_inputs(model, (), 0).find_ffns(model)
    ]
    return ffns, index, json.loads((directory / "config.json").read_text())


def fields_of(model: PreTrainedModel, directory: Path) -> list[WidthField | None]:
    ffns, _, config = placed(model, directory)
    return width_fields(config, ffns)


def names(found: list[WidthField | None]) -> list[str | None]:
    return [field.name if field else None for field in found]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_field_of_a_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    save_model(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    found = width_fields(config, family.blocks())
    assert [(field.name, field.factor, field.units) for field in found if field] == [(family.field, 1, family.width)] * 3


def test_a_field_may_set_several_widths(tmp_path: Path) -> None:
    """Two shared experts of DeepSeek are one FFN, twice as wide as a routed expert."""
    model = zoo.tiny("deepseek_v3", "causal")
    ffns, index, config = placed(model, tmp_path)
    found = width_fields(config, ffns)
    assert [(ffn.n_channels, field.name, field.factor, field.units) for ffn, field in zip(ffns, found, strict=True) if field] == [
        (44, "intermediate_size", 1, 44),
        (28, "moe_intermediate_size", 1, 28),
        (56, "moe_intermediate_size", 2, 28),
    ]
    smaller = edit_config(config, {("moe_intermediate_size",): found[1].value_at(9)})
    after = {name: shape for name, shape in meta_shapes(smaller).items() if ".mlp." in name and "layers.1" in name}
    assert after["model.layers.1.mlp.shared_experts.down_proj.weight"][1] == 18
    # Gate row, up row and write vector; a routed expert has as many parameters in a channel as a dense FFN.
    assert [channel_parameters(ffn, index) for ffn in ffns] == [3 * config["hidden_size"]] * 3


def test_a_field_may_hold_one_width_for_each_layer(tmp_path: Path) -> None:
    found = fields_of(zoo.tiny("gemma3n_text", "causal"), tmp_path)
    assert names(found) == [f"intermediate_size[{layer}]" for layer in range(len(found))]


def test_biases_count_as_parameters_of_a_channel(tmp_path: Path) -> None:
    ffns, index, config = placed(zoo.tiny("opt", "causal"), tmp_path)
    # A row with its bias, and a column. The bias of the write projection belongs to no channel.
    assert {channel_parameters(ffn, index) for ffn in ffns} == {2 * config["hidden_size"] + 1}


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "openai-gpt"])
def test_a_hard_coded_width_has_no_field(model_type: str, tmp_path: Path) -> None:
    assert set(fields_of(zoo.tiny(model_type, "causal"), tmp_path)) == {None}


def test_only_some_ffns_have_a_field(tmp_path: Path) -> None:
    """The adapters of X-MOD are as wide as a share of the hidden size."""
    ffns, _, config = placed(zoo.tiny("xmod", "masked"), tmp_path)
    found = width_fields(config, ffns)
    assert {(ffn.n_channels, field and field.name) for ffn, field in zip(ffns, found, strict=True)} == {
        (44, "intermediate_size"),
        (16, None),
    }


def test_a_field_that_changes_more_is_not_taken(tmp_path: Path) -> None:
    """Without the second FFN, the field of both would change an FFN that nobody knows of."""
    ffns, _, config = placed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), tmp_path)
    assert names(width_fields(config, ffns)) == ["intermediate_size"] * 2
    assert width_fields(config, ffns[:1]) == [None]


def test_a_width_that_other_quantities_share(tmp_path: Path) -> None:
    """Vocabulary and context have the FFN's width too; only the right field is taken."""
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": 37, "max_position_embeddings": 37})
    assert names(fields_of(transformers.LlamaForCausalLM(config), tmp_path)) == ["intermediate_size"] * 2


def test_two_fields_in_one_model(tmp_path: Path) -> None:
    """Encoder and decoder widths are separate fields, even if they are equal."""
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
    found = fields_of(transformers.BartForConditionalGeneration(config), tmp_path)
    assert names(found) == ["encoder_ffn_dim"] * 2 + ["decoder_ffn_dim"] * 2


def test_a_field_in_a_nested_config(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=LLAMA | {"head_dim": 6},
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
    found = fields_of(transformers.Gemma3ForConditionalGeneration(config), tmp_path)
    assert set(names(found)) == {"text_config.intermediate_size"}


def test_a_ratio_takes_any_number_that_gives_whole_widths(tmp_path: Path) -> None:
    """The widths of a hierarchical model are one ratio times the hidden sizes of its stages."""
    found = fields_of(zoo.tiny("swin", "image"), tmp_path)
    assert len({field.path for field in found if field}) == 1
    first = next(field for field in found if field)
    assert first.path == ("mlp_ratio",)
    assert first.value_at(first.units // 2) == first.before / 2
    assert {field.factor * field.units for field in found if field} == {field.factor * first.units for field in found if field}


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
