"""A model that is in memory: its atlas is that of the checkpoint it would save, and it is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc

import pytest
import torch
import transformers
from torch import nn

import chanfmt
from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.building.loaded import build_loaded
from chanfmt.building.options import BuildOptions
from chanfmt.models.load import load_model
from chanfmt.models.memory import in_memory
from tests.support import zoo
from tests.support.builds import SETTINGS, assert_equal, build, request
from tests.support.heard import heard
from tests.support.tiny import tiny_model, tiny_tokenizer


def in_use(model_type="llama", **changes):
    """A model in the middle of a training: in training mode but for one part, one part frozen, with hooks."""
    model = tiny_model(model_type, **changes)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[2].register_forward_hook(lambda module, args, output: None)
    model.model.layers[2].mlp.register_full_backward_hook(lambda module, before, after: None)
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


def state_of(model):
    """All that a measurement must not change."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: parameter.grad is not None for name, parameter in model.named_parameters()},
        "dtypes": {name: parameter.dtype for name, parameter in model.named_parameters()},
        "identities": {name: id(parameter) for name, parameter in model.named_parameters()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "tensor hooks": {name: list(parameter._backward_hooks or ()) for name, parameter in model.named_parameters()},
        "forwards": {name: "forward" in vars(module) for name, module in model.named_modules()},
        "config": copy.deepcopy(vars(model.config)),
        "generation": copy.deepcopy(vars(model.generation_config)),
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_as_before(model, before):
    after = state_of(model)
    for name in before:
        if name != "values":
            assert after[name] == before[name], name
    assert all(torch.equal(value, before["values"][name]) for name, value in after["values"].items())


def use_and_fail(model):
    """Look at the model in the body of `in_memory`, and leave it by an error."""
    with in_memory(model, tiny_tokenizer()) as source:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        assert load_model(source) is model
        raise UsageError("in the body")


@pytest.mark.parametrize(("calib", "order"), [("pydoc", "auto"), ("self", "recompute")])
def test_equals_the_build_of_the_saved_checkpoint(tmp_path, calib, order):
    model, tokenizer = in_use(), tiny_tokenizer()
    before = state_of(model)
    options = request(tmp_path / "model", tmp_path / "memory.h5", calib=calib)
    path = build_loaded(model, tokenizer, dataclasses.replace(options, memory=order), SETTINGS, id="model")
    assert_as_before(model, before)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert_equal(path, build(dataclasses.replace(options, output=str(tmp_path / "saved.h5")), SETTINGS))
    with chanfmt.open(path) as atlas:
        assert (atlas.model.id, atlas.model.source, atlas.model.revision) == ("model", "local", "")


def test_experts_are_named_as_the_checkpoint_names_them(tmp_path):
    zoo.tiny("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    options = request(tmp_path / "model", tmp_path / "memory.h5")
    path = build_loaded(model, tiny_tokenizer(), options, SETTINGS)
    assert_equal(path, build(dataclasses.replace(options, output=str(tmp_path / "saved.h5")), SETTINGS))


def test_a_loaded_model_is_measured_in_its_own_dtype(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with heard() as said:
        path = build_loaded(model, tiny_tokenizer(), request("-", tmp_path / "a.h5"), SETTINGS)
    assert any("bfloat16 rounds activations and gradients" in text for text in said)
    with chanfmt.open(path) as atlas:
        assert atlas.model.dtype == "bfloat16"
    assert model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="--dtype float32 cannot be used with a model that is in memory in bfloat16"):
        build_loaded(model, tiny_tokenizer(), request("-", tmp_path / "b.h5", dtype="float32"), SETTINGS)


def test_an_interrupted_build_continues(tmp_path, monkeypatch):
    from tests.support.interrupted import killed_after

    model = in_use()
    before = state_of(model)
    options = request("-", tmp_path / "a.h5", checkpoint_every=0)
    with killed_after(4, monkeypatch):
        build_loaded(model, tiny_tokenizer(), options, SETTINGS, id="m")
    assert_as_before(model, before)
    path = build_loaded(model, tiny_tokenizer(), dataclasses.replace(options, resume=True), SETTINGS, id="m")
    whole = build_loaded(model, tiny_tokenizer(), dataclasses.replace(options, output=str(tmp_path / "b.h5")), SETTINGS, id="m")
    assert_equal(path, whole)
    assert_as_before(model, before)


def test_the_model_is_as_it_was_after_an_error(tmp_path):
    model = in_use()
    broken = {"on": True}

    def fail(module, args):
        if broken["on"] and torch.is_grad_enabled():
            raise RuntimeError("broken in the middle")

    model.model.layers[1].register_forward_pre_hook(fail)
    before = state_of(model)
    for order in ("whole", "recompute"):
        with pytest.raises(ChanfmtError, match="broken in the middle"):
            build_loaded(model, tiny_tokenizer(), request("-", tmp_path / "a.h5", memory=order), SETTINGS)
        assert_as_before(model, before)
    with pytest.raises(UsageError, match="in the body"):
        use_and_fail(model)
    assert_as_before(model, before)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    before = state_of(model)
    with pytest.raises(ModelError, match="NaN or infinite"):
        build_loaded(model, tiny_tokenizer(), request("-", tmp_path / "a.h5"), SETTINGS)
    after = state_of(model)
    assert {name: after[name] for name in after if name != "values"} == {
        name: before[name] for name in before if name != "values"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": True}, "--stream is for a model that is read from its files"),
        ({"device_map": "auto"}, "--device-map is for"),
        ({"revision": "main"}, "--revision is for"),
        ({"revisions": "a,b"}, "--revisions is for"),
    ],
)
def test_what_needs_files_is_refused(tmp_path, changes, message):
    options = BuildOptions("-", str(tmp_path / "a.h5"), calib="pydoc", **changes)
    with pytest.raises(UsageError, match=message):
        build_loaded(tiny_model("llama"), tiny_tokenizer(), options, SETTINGS)


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="measured in one process"):
        build_loaded(tiny_model("llama"), tiny_tokenizer(), request("-", tmp_path / "a.h5"), SETTINGS)


def test_what_is_not_a_whole_model_is_refused(tmp_path):
    def refused(model, message):
        with pytest.raises(ChanfmtError, match=message), in_memory(model, tiny_tokenizer()):
            pass

    refused(nn.Linear(2, 2), "Linear is not a transformers model")
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(tiny_model("llama").config)
    refused(hollow, "not in memory")
    with pytest.raises(UsageError, match="without a tokenizer"):
        build_loaded(tiny_model("llama"), None, request("-", tmp_path / "a.h5"), SETTINGS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/model-1b", "org/model-1b"), ("/home/someone/runs/my-model", "my-model"), ("./runs/mine", "mine"), ("", "llama")],
)
def test_the_name_tells_no_directory(name, expected):
    model = tiny_model("llama")
    model.config.name_or_path = name
    with in_memory(model) as source:
        assert source.id == expected


def test_nothing_of_the_checkpoint_stays(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    build_loaded(tiny_model("llama"), tiny_tokenizer(), request("-", tmp_path / "a.h5"), SETTINGS)
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
