"""What travels with the weights: modules of sentence-transformers, configs without the names of code files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from chanfmt.base.errors import ModelError
from chanfmt.models.sentence_transformers import module_directories
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.carried import find_carried
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.result.result import check_unchanged, open_result
from tests.support.after import IDS, SIZES, edit_json, half_plan, llama, masked, saved, tensors
from tests.support.heard import heard

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan


def phi3(directory: Path) -> Path:
    """A model whose configs name code files, which are there, and which the stock class does not need."""
    config = transformers.Phi3Config(**SIZES, intermediate_size=40, num_key_value_heads=2, pad_token_id=2)
    saved(transformers.Phi3ForCausalLM(config), directory)
    edit_json(
        directory / "config.json",
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        custom_pipelines={"chat": {"impl": "pipeline_phi3.Chat", "pt": ["AutoModelForCausalLM"]}},
        inner_config={"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "kept": 1},
    )
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_phi3.Phi3Tokenizer", None]})
    edit_json(directory / "generation_config.json", custom_generate="generate.py")
    for name in ("preprocessor", "processor"):
        value = {"auto_map": {"AutoProcessor": "processing_phi3.Phi3Processor"}, "kept": [1]}
        (directory / f"{name}_config.json").write_text(json.dumps(value))
    (directory / "configuration_phi3.py").write_text("from transformers import Phi3Config\n")
    (directory / "modeling_phi3.py").write_text("from transformers import Phi3ForCausalLM\n")
    (directory / "tokenization_phi3.py").write_text("from transformers import PreTrainedTokenizerFast as Phi3Tokenizer\n")
    return directory


def code_names(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*.json") if "auto_map" in path.read_text() or "custom_pipe" in path.read_text()]


def test_results_name_no_code_files(tmp_path: Path) -> None:
    model = phi3(tmp_path / "model")
    plan = half_plan(model)
    with heard() as said:
        apply_plan(plan, ModelSource(model), tmp_path / "out")
    assert said == []
    assert code_names(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["inner_config"] == {"kept": 1}
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"kept": [1]}
    expected = logits(masked(transformers.Phi3ForCausalLM.from_pretrained(model), plan))
    for trust in (False, True):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert type(loaded) is transformers.Phi3ForCausalLM
        assert torch.allclose(logits(loaded.eval()), expected, atol=1e-5)
        transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert (
            tokenizer("ab")["input_ids"]
            == transformers.AutoTokenizer.from_pretrained(llama(tmp_path / f"x{trust}"))("ab").input_ids
        )
    # A result that still names them, as an earlier version wrote it, is restored without the names.
    edit_json(tmp_path / "out" / "config.json", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    restore(ModelSource(tmp_path / "out"), tmp_path / "wide")
    assert code_names(tmp_path / "wide") == []
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", trust_remote_code=True)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_a_tokenizer_that_needs_the_code_is_said(tmp_path: Path) -> None:
    model = phi3(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    edit_json(model / "tokenizer_config.json", tokenizer_class="Phi3Tokenizer")
    with heard() as said:
        apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(verify=False))
    assert any("the tokenizer needs code of the model's repository" in line for line in said)


def sentence_transformer(directory: Path, *modules: dict[str, Any]) -> Path:
    config = transformers.BertConfig(**SIZES, intermediate_size=40, max_position_embeddings=64)
    saved(transformers.BertModel(config), directory)
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}, *modules]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return directory


def module(path: str, kind: str = "sentence_transformers.models.Pooling") -> dict[str, Any]:
    return {"idx": 1, "name": "1", "path": path, "type": kind}


def with_modules(directory: Path) -> Path:
    """Pooling, a dense layer with weights of its own, a router with a directory in its directory, and Normalize without one."""
    model = sentence_transformer(
        directory,
        module("1_Pooling"),
        module("2_Dense", "sentence_transformers.models.Dense"),
        module("3_Router", "sentence_transformers.models.Router"),
        module("4_Normalize", "sentence_transformers.models.Normalize"),
    )
    for name in ("1_Pooling", "2_Dense", "3_Router/query_0_Dense", "unnamed"):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text(json.dumps({"word_embedding_dimension": 32}))
    save_file({"linear.weight": torch.randn(16, 32)}, model / "2_Dense" / "model.safetensors")
    (model / "2_Dense" / "module.py").write_text("raise SystemExit")
    (model / "2_Dense" / ".secret").write_text("x")
    return model


def names(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file() and path.parent != directory
    }


def test_modules_travel(tmp_path: Path) -> None:
    model = with_modules(tmp_path / "model")
    plan = half_plan(model)
    apply_plan(plan, ModelSource(model), tmp_path / "out")
    expected = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Router/query_0_Dense/config.json"}
    assert names(tmp_path / "out") == expected
    for name in (*expected, "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    # The weights of the module are no shard of the model.
    assert not any(name.startswith("linear") for name in tensors(tmp_path / "out"))
    # The manifest covers them, so a push takes them and sees a change.
    check_unchanged(open_result(tmp_path / "out"))
    assert expected <= set(open_result(tmp_path / "out").names)
    embedding(tmp_path / "out", model, plan)
    restore(ModelSource(tmp_path / "out"), tmp_path / "wide")
    assert names(tmp_path / "wide") == expected


def embedding(result: Path, model: Path, plan: PruningPlan) -> None:
    """Compare mean-pooled embeddings, as sentence-transformers computes them, with those of the masked dense model."""
    with torch.inference_mode():
        found = transformers.AutoModel.from_pretrained(result).eval()(IDS).last_hidden_state.mean(1)
        expected = masked(transformers.AutoModel.from_pretrained(model), plan)(IDS).last_hidden_state.mean(1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x", "a\\b", "C:x", "~/x", ".git", "a/.ssh", "\n"])
def test_a_path_that_leads_out_is_refused(path: str, tmp_path: Path) -> None:
    model = sentence_transformer(tmp_path / "model", module(path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "secret.json").write_text("{}")
    with pytest.raises(ModelError, match=r"modules\.json"):
        apply_plan(half_plan(model), ModelSource(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[1]", "[", '[{"path": 3}]', '[{"path": "a", "path": "b"}]'])
def test_a_damaged_list_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"modules\.json"):
        module_directories(tmp_path)


def test_links_out_of_a_module_are_not_followed(tmp_path: Path) -> None:
    model = sentence_transformer(tmp_path / "model", module("1_Pooling"), module("2_Other"))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("private")
    (model / "1_Pooling").symlink_to(tmp_path / "private")
    (model / "2_Other").mkdir()
    (model / "2_Other" / "config.json").symlink_to(tmp_path / "private" / "config.json")
    with heard() as said:
        carried = find_carried(model)
    assert not any("1_Pooling" in str(path) or "2_Other" in str(path) for path in carried.files)
    assert any("2_Other/config.json is not carried over: it is a link" in line for line in said)


def test_what_sentence_transformers_will_miss_is_said(tmp_path: Path) -> None:
    model = sentence_transformer(tmp_path / "model", module("1_Dense"), module("2_Own", "custom_st.Transformer"))
    (model / "1_Dense").mkdir()
    (model / "1_Dense" / "pytorch_model.bin").write_bytes(b"x")
    with heard() as said:
        carried = find_carried(model)
    assert not any(path.suffix == ".bin" for path in carried.files)
    assert any("1_Dense/pytorch_model.bin is not carried over" in line for line in said)
    assert any("names the class custom_st.Transformer" in line for line in said)
