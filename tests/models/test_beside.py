"""Files beside the weights: adapters, quantisers' files, second checkpoints. What is installed changes no number."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.accounting import check_accounted
from chanfmt.models.quantised import check_loaded
from chanfmt.models.source import ModelSource, check_plain, local_source
from tests.support import spoiled
from tests.support.heard import heard
from tests.support.spoiled import llama, store, stored

if TYPE_CHECKING:
    from pathlib import Path

BUILD = """
import hashlib, json, sys
state, *models = sys.argv[1:]
if state == "without":
    sys.modules["peft"] = None
from transformers.utils import is_peft_available
assert is_peft_available() == (state == "with"), is_peft_available()
import chanfmt
found = []
for model in models:
    try:
        with chanfmt.build(model, f"{model}-{state}.h5", "pydoc", sequences=2, seq_len=32, batch_size=2, support_size=8) as atlas:
            stacks = [stack.variables for stack in atlas.content().stacks]
        found.append([[name, hashlib.sha256(values.tobytes()).hexdigest()] for stack in stacks for name, values in stack.items()])
    except chanfmt.ModelError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def with_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds peft: the installed one, or a package that has no more than its name."""
    if importlib.util.find_spec("peft") is not None:
        return dict(os.environ)
    directory = tmp_path_factory.mktemp("packages")
    (directory / "peft").mkdir()
    (directory / "peft" / "__init__.py").write_text("__version__ = '0.18.0'\n")
    (directory / "peft-0.18.0.dist-info").mkdir()
    (directory / "peft-0.18.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.18.0\n")
    path = [str(directory), *sys.path]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def built(models: list[Path], state: str, environment: dict[str, str]) -> list[Any]:
    """What builds in a process of their own give: digests of the arrays of each atlas, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, state, *map(str, models)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peft_changes_no_number(tmp_path, with_peft):
    models = [llama(tmp_path / "plain"), spoiled.adapter(tmp_path / "adapted")]
    plain, adapted = found = built(models, "with", with_peft)
    assert len(plain) > 10
    assert "merge it first" in adapted
    assert built(models, "without", with_peft) == found


def test_the_hint_for_an_adapter_merges_it(tmp_path):
    peft = pytest.importorskip("peft")
    model = spoiled.adapter(tmp_path / "model")
    before = stored(model)
    (tmp_path / "ADAPTER").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (model / name).rename(tmp_path / "ADAPTER" / name)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model)
    peft.PeftModel.from_pretrained(dense, tmp_path / "ADAPTER").merge_and_unload().save_pretrained(tmp_path / "merged")
    check_accounted(ModelSource(tmp_path / "merged"))
    changed = {name for name, tensor in stored(tmp_path / "merged").items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".mlp." in name}


def test_an_adapter_without_a_model(tmp_path):
    spoiled.adapter(tmp_path)
    (tmp_path / "config.json").unlink()
    for open_source in (lambda: local_source(str(tmp_path)), lambda: ModelSource(tmp_path).config):
        with pytest.raises(ModelError, match=r"is an adapter, not a model(.|\n)*from_pretrained\('user/base'\)"):
            open_source()


@pytest.mark.parametrize(
    ("fields", "file", "content", "sentence"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "", None, "config.json has quantization_config: awq"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "", None, "text_config.quantization_config: 4 bits"),
        ({"compression_config": {"format": "pack-quantized"}}, "", None, "compression_config: pack-quantized"),
        ({}, "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "hf_quant_config.json says NVFP4"),
        ({}, "quantize_config.json", {"bits": 4, "group_size": 128}, "quantize_config.json says 4 bits"),
        ({}, "quant_config.json", {"zero_point": True}, "quant_config.json lies beside its weights"),
        ({}, "quanto_qmap.json", {"model.layers.0": {"weights": "qint8"}}, "quanto_qmap.json lies beside"),
    ],
)
def test_what_quantisers_write(fields, file, content, sentence, tmp_path):
    spoiled.edit_config(llama(tmp_path), **fields)
    if file:
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is quantised") as error:
        check_plain(ModelSource(tmp_path))
    assert sentence in str(error.value)
    assert ("remove" in str(error.value)) == bool(file)


@pytest.mark.parametrize("content", [{"quantization": {"quant_algo": None}}, {"quant_algo": None}])
def test_a_file_that_says_nothing_is_quantised(content, tmp_path):
    spoiled.edit_config(llama(tmp_path), quantization_config=None)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    check_plain(ModelSource(tmp_path))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight", torch.float8_e4m3fn),
        ("weight", torch.float8_e5m2),
        ("weight", torch.int8),
        ("weight", torch.uint8),
        ("qweight", torch.int32),
        ("weight_packed", torch.int32),
        ("weight_scale_inv", torch.float32),
        ("weight.absmax", torch.float32),
        ("weight.quant_state.bitsandbytes__nf4", torch.uint8),
        ("SCB", torch.float32),
    ],
)
def test_tensors_of_quantised_weights(name, dtype, tmp_path):
    llama(tmp_path)
    name = f"model.layers.1.mlp.up_proj.{name}"
    store(tmp_path, stored(tmp_path) | {name: torch.ones(8, 8).to(dtype)})
    with pytest.raises(ModelError, match="is quantised") as error:
        check_plain(ModelSource(tmp_path))
    assert name in str(error.value)


def test_quantised_blocks(tmp_path):
    llama(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    store(tmp_path, stored(tmp_path) | {f"{name}_blocks": torch.ones(8), f"{name}_scales": torch.ones(8)})
    with pytest.raises(ModelError, match=f"is quantised .*{name}_blocks"):
        check_plain(ModelSource(tmp_path))


def test_a_quantised_model_in_memory(tmp_path):
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama(tmp_path))
    check_loaded(model, "m")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"m is quantised \(model\.layers\.0\.mlp\.up_proj\.weight is float8_e4m3fn\)"):
        check_loaded(model, "m")


def test_a_config_that_names_other_weights(tmp_path):
    spoiled.edit_config(llama(tmp_path), transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match=r"names another file of weights \(transformers_weights: 'other\.safetensors'\)"):
        check_plain(ModelSource(tmp_path))


def test_a_distributed_checkpoint_beside_the_weights(tmp_path):
    llama(tmp_path)
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="shards of a distributed checkpoint"):
        check_plain(ModelSource(tmp_path))


def test_a_partial_file_beside_good_shards(tmp_path):
    spoiled.split(llama(tmp_path), keep=True)
    single = tmp_path / "model.safetensors"
    assert [file.name for file in ModelSource(tmp_path).index.files] == ["model.safetensors"]
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"is cut short(.|\n)*remove model\.safetensors, which transformers reads first"):
        _ = ModelSource(tmp_path).index


def test_two_different_checkpoints(tmp_path):
    spoiled.split(llama(tmp_path), keep=True)
    tensors = stored(tmp_path)
    store(tmp_path, tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(ModelError, match="holds two different checkpoints"):
        _ = ModelSource(tmp_path).index


def test_stale_shards_beside_a_good_file(tmp_path):
    spoiled.split(llama(tmp_path), keep=True)
    (tmp_path / "model.safetensors.index.json").unlink()
    with heard() as said:
        check_accounted(ModelSource(tmp_path))
    assert said == [
        "model-00001-of-00002.safetensors (and 1 more such files) does not belong to the checkpoint in use, and is not read"
    ]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["pytorch_model.bin", "training_args.bin"], "has only pickled weights (pytorch_model.bin)"),
        (["pytorch_model-00001-of-00002.bin"], "transformers.LlamaForCausalLM.from_pretrained("),
        (["consolidated.00.pth"], "consolidated.00.pth is not a checkpoint that transformers reads"),
        (["training_args.bin", "optimizer.pt"], "it is not a checkpoint directory as transformers saves it"),
    ],
)
def test_pickled_weights(files, sentence, tmp_path):
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError) as error:
        _ = ModelSource(tmp_path).index
    assert sentence in str(error.value)


def test_the_hint_for_pickled_weights_converts_them(tmp_path):
    llama(tmp_path / "model")
    expected = stored(tmp_path / "model")
    torch.save(expected, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        _ = ModelSource(tmp_path / "model").index
    hint = str(error.value.hint)
    code = hint[hint.index("transformers.") : hint.index(" writes")].replace("DIRECTORY", repr(str(tmp_path / "new")))
    eval(code, {"transformers": transformers})
    found = stored(tmp_path / "new")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_snapshot_without_safetensors(tmp_path):
    directory = tmp_path / "snapshots" / "0123"
    llama(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the model's repository holds neither(.|\n)*pytorch_model\.bin"):
        _ = ModelSource(directory, "user/model", "0123", "hub").index
