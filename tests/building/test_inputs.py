"""The inputs of attention and of read projections: against plain hooks, in a complete importance matrix, and on the way back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.algebra.inputs import GROUP, read_inputs
from chanfmt.base.errors import AtlasError
from chanfmt.building.options import BuildOptions
from chanfmt.cli.main import main
from chanfmt.format.records import LabelSettings
from chanfmt.format.writer import write_atlas
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from tests.support.builds import build
from tests.support.tiny import save_tiny

gguf = pytest.importorskip("gguf")
SETTINGS = LabelSettings(rho=0.03, support_size=8)
SIZES = {
    "llama": {},
    "mixtral": {
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
    },
    "phi": {
        "hidden_size": 36,
        "intermediate_size": 87,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 128,
    },
}
READ = {
    "llama": {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "mixtral": {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate": "ffn_gate_inp",
    },
    "phi": {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
}
"""For each model type its linear modules in a block, and llama.cpp's name of their weight, as llama-imatrix writes it."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Function from a model type to its tiny checkpoint and an atlas of it."""
    made = {}

    def get(kind):
        if kind not in made:
            home = tmp_path_factory.mktemp(kind)
            model = save_tiny(home / "checkpoint", kind, **SIZES[kind])
            made[kind] = model, build(options(model, home / "a.h5"), SETTINGS)
        return made[kind]

    return get


def options(model, output, **changes):
    return BuildOptions(str(model), str(output), calib="pydoc", sequences=8, seq_len=16, batch_size="2", **changes)


def by_hooks(checkpoint, atlas, kind):
    """Mean squares of what each linear module reads, from a plain forward pass: name in llama.cpp to (matrix, input)."""
    found = {}
    with chanfmt.open(atlas) as opened:
        ids = torch.from_numpy(opened.calibration.token_ids).long()
    model = load_model(ModelSource(checkpoint), device="cpu")
    handles = []

    def see(module, name):
        def hook(module, args):
            found[name] = args[0].double().reshape(-1, args[0].shape[-1]).square().mean(0)[None]

        handles.append(module.register_forward_pre_hook(hook))

    def see_experts(module, layer):
        def hook(module, args):
            x, chosen = args[0].double(), args[1]
            reached = [x[(chosen == expert).any(-1)].square().sum(0) for expert in range(chosen.max() + 1)]
            counts = torch.tensor([int((chosen == expert).any(-1).sum()) for expert in range(len(reached))])
            for name in ("ffn_gate_exps", "ffn_up_exps"):
                found[f"blk.{layer}.{name}"] = torch.stack(reached) / counts[:, None]

        handles.append(module.register_forward_pre_hook(hook))

    for layer, block in enumerate(model.model.layers):
        for path, name in READ[kind].items():
            see(block.get_submodule(path), f"blk.{layer}.{name}")
        if kind == "mixtral":
            see_experts(block.mlp.experts, layer)
    with torch.no_grad():
        model(ids)
    return {name: values.numpy() for name, values in found.items()}


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_complete_importance_matrix_equals_plain_hooks_and_comes_back(measured, tmp_path, capsys, kind):
    checkpoint, atlas = measured(kind)
    assert main(["export", str(atlas), "-o", str(tmp_path / "m.imatrix.gguf")]) == 0
    assert "cover" not in capsys.readouterr().err
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.imatrix.gguf").tensors}
    expected = by_hooks(checkpoint, atlas, kind)
    names = {f"{name}.weight" for name in expected}
    if kind == "mixtral":
        names |= {f"blk.{layer}.ffn_down_exps.weight" for layer in range(2)}
    assert {name.removesuffix(".in_sum2") for name in written if name.endswith(".in_sum2")} == names
    for name, values in expected.items():
        sums, counts = written[f"{name}.weight.in_sum2"], written[f"{name}.weight.counts"]
        np.testing.assert_allclose(sums / counts, values, rtol=1e-5, err_msg=name)

    command = ["import-imatrix", str(tmp_path / "m.imatrix.gguf"), "--model", str(checkpoint)]
    assert main([*command, "-o", str(tmp_path / "b.h5")]) == 0
    with chanfmt.open(atlas) as before, chanfmt.open(tmp_path / "b.h5") as after:
        for one, other in zip(read_inputs(before), read_inputs(after), strict=True):
            assert (one.weights, one.expert, one.tokens) == (other.weights, other.expert, other.tokens)
            np.testing.assert_array_equal(one.sums.astype(np.float32), other.sums)


def test_every_order_of_a_pass_has_the_same_inputs_and_a_merge_adds_them(measured, tmp_path):
    checkpoint, atlas = measured("llama")
    path = {(0, False): atlas}
    for seed, stream in ((0, True), (5, False)):
        path[seed, stream] = build(options(checkpoint, tmp_path / f"{seed}{stream}.h5", stream=stream, seed=seed), SETTINGS)
    recomputed = build(options(checkpoint, tmp_path / "recomputed.h5", memory="recompute"), SETTINGS)
    with chanfmt.open(atlas) as plain, chanfmt.open(recomputed) as again:
        for one, other in zip(read_inputs(plain), read_inputs(again), strict=True):
            np.testing.assert_allclose(other.sums, one.sums, rtol=1e-5)
            assert other.tokens == one.tokens
    assert main(["merge", str(path[0, False]), str(path[5, False]), "-o", str(tmp_path / "merged.h5")]) == 0
    with (
        chanfmt.open(path[0, False]) as plain,
        chanfmt.open(path[0, True]) as streamed,
        chanfmt.open(path[5, False]) as other,
        chanfmt.open(tmp_path / "merged.h5") as merged,
    ):
        rows = [read_inputs(atlas) for atlas in (plain, streamed, other, merged)]
    assert len(rows[0]) == 9
    for one, again, more, both in zip(*rows, strict=True):
        assert one.weights == again.weights == more.weights == both.weights
        np.testing.assert_allclose(again.sums, one.sums, rtol=1e-5)
        np.testing.assert_array_equal(both.sums, one.sums + more.sums)
        assert (one.tokens, both.tokens) == (again.tokens, one.tokens + more.tokens) == (128, 256)


def test_an_older_atlas_says_what_its_matrix_lacks(measured, tmp_path, capsys):
    _, atlas = measured("llama")
    with chanfmt.open(atlas) as opened:
        content = opened.content()
    older = dataclasses.replace(content, extensions=tuple(group for group in content.extensions if group.path != GROUP))
    write_atlas(older, tmp_path / "old.h5")
    assert main(["export", str(tmp_path / "old.h5"), "-o", str(tmp_path / "m.imatrix.gguf")]) == 0
    assert "covers the down projections only" in capsys.readouterr().err
    assert len(gguf.GGUFReader(tmp_path / "m.imatrix.gguf").tensors) == 2 * 3


def test_numbers_that_count_nothing_are_refused(measured, tmp_path):
    _, path = measured("llama")
    with chanfmt.open(path) as atlas:
        content = atlas.content()
    for name, wrong in (("tokens", -1), ("expert", -2)):
        groups = [
            dataclasses.replace(
                group,
                variables=tuple(
                    dataclasses.replace(item, values=np.full_like(item.values, wrong)) if item.name == name else item
                    for item in group.variables
                ),
            )
            for group in content.extensions
        ]
        write_atlas(dataclasses.replace(content, extensions=tuple(groups)), tmp_path / f"{name}.h5")
        with chanfmt.open(tmp_path / f"{name}.h5") as atlas, pytest.raises(AtlasError, match="not as the specification says"):
            read_inputs(atlas)
