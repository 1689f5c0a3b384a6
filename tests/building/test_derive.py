"""The arrays of a finished atlas, recomputed from its own tokens, settings and the checkpoint's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import chanfmt
from chanfmt.building.derive import layer_variables, stack_layers
from chanfmt.building.measure import measure
from chanfmt.data.tokens import canonical
from chanfmt.format import schema
from chanfmt.format.records import LabelSettings
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.matrices import ffn_weights
from tests.support.direct import direct
from tests.support.plain_labels import plain_connectivity, plain_protection, plain_top
from tests.support.tiny import random_tokens, tiny_model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_atlas_equals_a_recomputation_from_its_own_tokens(model_type, tiny_checkpoint, tiny_atlas):
    with chanfmt.open(tiny_atlas(model_type)) as atlas:
        content = atlas.content()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type)).eval()
    model.requires_grad_(False)
    ffns = find_ffns(model)
    us, ss = direct(model, ffns, torch.from_numpy(content.calibration.token_ids).long())
    stack = content.stacks[0].variables
    settings = content.labels
    late = content.calibration.split_of > 0
    support = None
    for row, ffn in enumerate(ffns):
        u, s = us[ffn.write], ss[ffn.write]
        q = u * s
        stored = {
            name: values[row] for name, values in stack.items() if schema.STACK_VARIABLE_BY_NAME[name].dimensions[0] == "layer"
        }
        np.testing.assert_allclose(stored["lp"], 0.5 * (q**2).mean((0, 1)), rtol=1e-3, atol=1e-6 * stored["lp"].max())
        weights = ffn_weights(model, ffn.members[0])
        write = weights.write.numpy()
        core = plain_top(stored["lp"].tolist(), 2)
        assert np.flatnonzero(stored["label"] == schema.LABEL_SUPERNODE).tolist() == core
        if support is None:
            assert np.isnan(stored["read_connectivity"]).all()
        else:
            reads = np.concatenate([np.abs(rows.numpy()) for rows in weights.reads.values()], axis=1)
            inside = sum(np.abs(rows.numpy())[:, support].sum(1) for rows in weights.reads.values())
            np.testing.assert_allclose(stored["read_connectivity"], inside / reads.sum(1), rtol=1e-5)
        support, conn = plain_connectivity(write.tolist(), core, settings.support_size)
        np.testing.assert_allclose(stored["connectivity"], conn, rtol=1e-6)
        others = [index for index in range(87) if index not in core]
        halo = [others[i] for i in plain_top([float(stored["connectivity"][j]) for j in others], 8)]
        assert np.flatnonzero(stored["label"] == schema.LABEL_HALO).tolist() == halo
        flat = q[late].reshape(-1, 87)
        candidates = plain_top((q[~late] ** 2).sum((0, 1)).tolist(), 5)
        covered = [index for index in core if index in candidates]
        assert stored["core_covered"] == pytest.approx(len(covered) / len(core))
        assert stored["redundancy_tokens"] == len(flat)
        if covered:
            r = np.corrcoef(flat.T)[:, covered]
            r[covered, range(len(covered))] = np.nan
            pairs = -0.5 * np.log(1 - np.maximum(r, 0) ** 2)
            with np.errstate(invalid="ignore"):
                expected = np.nanmean(pairs, axis=1) if len(covered) > 1 else pairs[:, 0]
            np.testing.assert_allclose(stored["redundancy"], expected, rtol=1e-3, atol=1e-7)
            known = [index for index in halo if not np.isnan(stored["redundancy"][index])]
            np.testing.assert_allclose(
                stored["protection"], plain_protection(stored["redundancy"].tolist(), known, 0.2, 8), rtol=1e-5
            )
        power = (u**2).mean((0, 1))
        np.testing.assert_allclose(stored["write_norm"], np.linalg.norm(write, axis=0), rtol=1e-5)
        assert (stored["wanda_group"] >= np.sqrt(power) * np.abs(write).sum(0) * (1 - 1e-4)).all()


def test_wanda_group_uses_each_weights_own_input():
    model = tiny_model("llama", dtype=torch.float64)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    tokens = canonical(random_tokens(6, 24).numpy())
    inputs = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().numpy()))
    us, _ = direct(model, ffns, torch.from_numpy(tokens.ids).long())
    handle.remove()
    found = measure(model, ffns, tokens, rho=0.03)
    variables, _ = layer_variables(found.statistics[1], [ffn_weights(model, ffns[1].members[0])], LabelSettings(rho=0.03), None)
    mlp = model.model.layers[1].mlp
    x = np.sqrt((np.concatenate(inputs) ** 2).mean((0, 1)))
    u = np.sqrt((us[ffns[1].write] ** 2).mean((0, 1)))
    expected = (
        np.abs(mlp.gate_proj.weight.numpy()) @ x
        + np.abs(mlp.up_proj.weight.numpy()) @ x
        + np.abs(mlp.down_proj.weight.numpy()).sum(0) * u
    )
    np.testing.assert_allclose(variables["wanda_group"], expected, rtol=1e-9)


def test_layers_of_several_widths_become_several_stacks():
    model = tiny_model("llama")
    model.model.layers[1].mlp = tiny_model("llama", intermediate_size=51).model.layers[1].mlp
    model.requires_grad_(False)
    ffns = find_ffns(model)
    found = measure(model, ffns, canonical(random_tokens(4, 24).numpy()), rho=0.03)
    layers = [
        layer_variables(statistics, [ffn_weights(model, ffn.members[0])], LabelSettings(rho=0.03), None)[0]
        for ffn, statistics in zip(ffns, found.statistics, strict=True)
    ]
    stacks, positions = stack_layers(ffns, layers, "silu", 256)
    assert [(stack.name, stack.n_channels, stack.layers.tolist()) for stack in stacks] == [
        ("decoder-87", 87, [0, 2]),
        ("decoder-51", 51, [1]),
    ]
    assert positions == [("decoder-87", 0), ("decoder-51", 0), ("decoder-87", 1)]
    assert stacks[0].variables["sum_q2_split"].shape == (schema.SPLITS, 2, 87)
    np.testing.assert_array_equal(np.asarray(stacks[0].variables["lp"])[1], layers[2]["lp"])


def test_supernodes_and_labels_with_so_few_channels_that_rho_m_is_below_one():
    model = tiny_model("gpt2")
    model.requires_grad_(False)
    ffns = find_ffns(model)
    found = measure(model, ffns, canonical(random_tokens(8, 24).numpy()), rho=0.001)
    variables, _ = layer_variables(found.statistics[0], [ffn_weights(model, ffns[0].members[0])], LabelSettings(rho=0.001), None)
    assert (variables["label"] == schema.LABEL_SUPERNODE).sum() == 1
    # With a core of one member, every channel except the member itself has it as partner.
    if variables["core_covered"]:
        assert np.isnan(variables["redundancy"]).sum() == 1
