"""Relabelling: the same settings change nothing, and other settings give the labels of a plain reading of the rules."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra import labels
from chanfmt.algebra.merge import merge
from chanfmt.algebra.relabel import relabelled, relabelled_with_weights
from chanfmt.algebra.strip import stripped
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.cli.main import main
from chanfmt.format import schema
from chanfmt.format.records import LabelSettings
from chanfmt.format.writer import write_atlas
from chanfmt.models.safetensors import CheckpointIndex, fingerprint
from chanfmt.models.source import ModelSource
from chanfmt.models.stored.weights import StoredWeights
from tests.support.factory import moe_content, random_content
from tests.support.hygiene import heavy_imports

OF_SUPPORT = ("read_connectivity", "write_dimension", "write_share")
MAKERS = {"dense": random_content, "experts": moe_content}


def read(path):
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.content()


@pytest.fixture(params=MAKERS)
def path(request, tmp_path):
    write_atlas(MAKERS[request.param](), tmp_path / "a.h5")
    return tmp_path / "a.h5"


@pytest.fixture
def content(path):
    return read(path)


def with_settings(content, **changes):
    return dataclasses.replace(content.labels, **changes)


def assert_same_arrays(first, second, *, apart_from=()):
    for stack, other in zip(first.stacks, second.stacks, strict=True):
        assert set(stack.variables) ^ set(other.variables) <= set(apart_from)
        assert stack.supports == other.supports
        for name in set(stack.variables) - set(apart_from):
            assert stack.variables[name].tobytes() == other.variables[name].tobytes(), name


def plain_labels(score, conn, redundancy, settings):
    """Spec sections "Metrics" and "Labels", channel by channel."""
    channels = len(score)
    label, protection = [0] * channels, [1.0] * channels
    if all(np.isnan(score)):
        return label, protection
    core = sorted(range(channels), key=lambda i: (-score[i], i))[: max(1, int(settings.rho * channels + 1e-9))]
    others = [i for i in range(channels) if i not in core]
    halo = sorted(others, key=lambda i: (-conn[i], i))[: int(settings.eta * len(others) + 1e-9)]
    for i in core:
        label[i] = 2
    for i in halo:
        label[i] = 1
    for rank, i in enumerate(sorted(halo, key=lambda i: (redundancy[i], i))):
        if len(halo) > 1:
            x = rank / (len(halo) - 1)
            protection[i] = settings.alpha + (1 - settings.alpha) * (1 - x**settings.gamma)
    return label, protection


def test_the_settings_already_there_change_nothing(content):
    found = relabelled(content, content.labels)
    assert_same_arrays(found, content)
    assert dataclasses.replace(found, stacks=()) == dataclasses.replace(content, stacks=())


@pytest.mark.parametrize(
    "changes",
    [
        {"rho": 0.05},
        {"rho": 0.0},
        {"rho": 1.0},
        {"eta": 0.4},
        {"eta": 0.0},
        {"alpha": 0.5},
        {"gamma": 1.0},
        {"rho": 0.1, "eta": 0.3, "alpha": 0.0, "gamma": 2.5},
    ],
    ids=str,
)
def test_other_settings_follow_the_rules(content, changes):
    settings = with_settings(content, **changes)
    found = relabelled(content, settings)
    assert (found.labels, found.core_rho, found.dropped) == (settings, content.core_rho, ())
    assert_same_arrays(found, content, apart_from=("label", "protection"))
    for stack in found.stacks:
        for at in np.ndindex(stack.variables["lp"].shape[:-1]):
            label, protection = plain_labels(
                *(stack.variables[name][at] for name in ("lp", "connectivity", "redundancy")), settings
            )
            np.testing.assert_array_equal(stack.variables["label"][at], label)
            np.testing.assert_allclose(stack.variables["protection"][at], protection, rtol=1e-6)


def test_another_support_takes_connectivity_from_the_file(content):
    found = relabelled(content, with_settings(content, support_size=16))
    assert found.dropped == OF_SUPPORT
    for stack, other in zip(found.stacks, content.stacks, strict=True):
        wanted = other.variables["connectivity_at"][other.supports.index(16)]
        assert stack.variables["connectivity"].tobytes() == wanted.tobytes()
        assert stack.variables["connectivity_at"] is other.variables["connectivity_at"]
        assert "read_connectivity" not in stack.variables
    back = relabelled(found, content.labels)
    assert back.dropped == OF_SUPPORT
    assert_same_arrays(back, content, apart_from=OF_SUPPORT)


def test_a_support_that_is_not_at_hand(content):
    with pytest.raises(AtlasError, match=r"no connectivity to 12 dimensions[\s\S]*that it holds: 8, 16.*--model"):
        relabelled(content, with_settings(content, support_size=12))


def test_what_cannot_be_relabelled(content):
    with pytest.raises(AtlasError, match="unfinished"):
        relabelled(dataclasses.replace(content, status="partial"), content.labels)
    for name, value in (("redundancy_top_k", 3), ("score", "taylor"), ("ties", "random")):
        with pytest.raises(UsageError, match=f"{name} is fixed"):
            relabelled(content, with_settings(content, **{name: value}))
    with pytest.raises(UsageError, match="--rho"):
        relabelled(content, with_settings(content, rho=2.0))
    odd = dataclasses.replace(content, labels=with_settings(content, score="luck"))
    with pytest.raises(AtlasError, match="no 'luck'"):
        relabelled(odd, odd.labels)


def test_a_merged_atlas_has_no_halo_at_any_setting(tmp_path):
    for seed in range(2):
        write_atlas(moe_content(calibration_seed=seed), tmp_path / f"{seed}.h5")
    with chanfmt.open(tmp_path / "0.h5") as first, chanfmt.open(tmp_path / "1.h5") as second:
        whole = merge([first, second])
    found = relabelled(whole, with_settings(whole, rho=0.1, eta=0.5, support_size=100))
    assert (found.core_rho, found.dropped) == (0.1, whole.dropped)
    for stack in found.stacks:
        assert not (stack.variables["label"] == schema.LABEL_HALO).any()
        assert (stack.variables["protection"] == 1).all()


def test_a_stripped_atlas_is_labelled_like_the_whole(content):
    settings = with_settings(content, rho=0.05, eta=0.2)
    found, whole = relabelled(stripped(content), settings), relabelled(content, settings)
    for stack, other in zip(found.stacks, whole.stacks, strict=True):
        for name in ("label", "protection"):
            assert stack.variables[name].tobytes() == other.variables[name].tobytes()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "opt"])
def test_the_weights_give_what_a_build_gives(model_type, tiny_atlas, tiny_checkpoint):
    content = read(tiny_atlas(model_type))
    weights = StoredWeights.of(ModelSource(tiny_checkpoint(model_type)), content.model)
    found = relabelled_with_weights(content, content.labels, weights)
    assert_same_arrays(found, content)
    assert (found.core_rho, found.dropped) == (content.core_rho, content.dropped)


@pytest.mark.parametrize(("stored", "ran"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_weights_are_rounded_as_the_model_was(stored, ran, tmp_path):
    import torch

    from chanfmt.building.options import BuildOptions
    from tests.support.builds import build
    from tests.support.tiny import save_tiny

    directory = save_tiny(tmp_path / "model", "llama", dtype=getattr(torch, stored))
    options = BuildOptions(str(directory), str(tmp_path / "a.h5"), calib="pydoc", sequences=4, seq_len=32, dtype=ran)
    content = read(build(options, LabelSettings(rho=0.03, support_size=8)))
    found = relabelled_with_weights(content, content.labels, StoredWeights.of(ModelSource(directory), content.model))
    assert_same_arrays(found, content)


def test_with_weights_another_core_drops_redundancy(tiny_atlas, tiny_checkpoint):
    content = read(tiny_atlas("llama"))
    weights = StoredWeights.of(ModelSource(tiny_checkpoint("llama")), content.model)
    found = relabelled_with_weights(content, with_settings(content, rho=0.1, support_size=11), weights)
    assert found.dropped == (
        "redundancy",
        "redundancy_null",
        "redundancy_partner",
        "redundancy_pair",
        "redundancy_tokens",
        "core_covered",
    )
    (stack,) = found.stacks
    assert 11 in stack.supports
    assert (found.core_rho, found.labels.rho) == (0.1, 0.1)
    assert (stack.variables["protection"] == 1).all()
    assert stack.variables["connectivity"].tobytes() == stack.variables["connectivity_at"][stack.supports.index(11)].tobytes()
    assert (stack.variables["label"] == schema.LABEL_HALO).sum() == 3 * 7
    # Labelled with another rho alone, the core is the old one, and to that the weights lead back.
    kept = relabelled_with_weights(relabelled(content, with_settings(content, rho=0.1)), content.labels, weights)
    assert_same_arrays(kept, content)
    # After another support without weights they bring back what was dropped.
    back = relabelled_with_weights(relabelled(content, with_settings(content, support_size=16)), content.labels, weights)
    assert_same_arrays(back, content)
    assert back.dropped == ()


@pytest.fixture
def experts(tmp_path):
    """An atlas with experts whose weights lie in a checkpoint: contents, weights, tensors by name."""
    from safetensors.numpy import save_file

    content = moe_content()
    random, hidden, tensors = np.random.default_rng(5), 24, {}
    for block in content.blocks:
        for item in block.tensors:
            shape = (hidden, block.n_channels) if item.axis == 1 else (block.n_channels, hidden)
            tensors[item.tensor] = random.normal(0, 1, shape).astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    model = dataclasses.replace(content.model, fingerprint=fingerprint(index))
    write_atlas(dataclasses.replace(content, model=model), tmp_path / "a.h5")
    return read(tmp_path / "a.h5"), StoredWeights(index, "float32"), tensors


def test_experts_from_their_weights(experts):
    content, weights, tensors = experts
    found = relabelled_with_weights(content, content.labels, weights)
    previous = None
    for block in found.blocks:
        variables = found.stacks[[stack.name for stack in found.stacks].index(block.stack)].variables
        mass = np.zeros(24)
        for expert in range(max(1, block.n_experts)):
            at = (block.row, expert) if block.n_experts else (block.row,)
            gate, up, write = (tensors[item.tensor].astype(np.float64) for item in block.tensors[3 * expert : 3 * expert + 3])
            if previous is None:
                assert np.isnan(variables["read_connectivity"][at]).all()
            else:
                both = np.abs(gate) + np.abs(up)
                np.testing.assert_allclose(
                    variables["read_connectivity"][at], both[:, previous].sum(axis=1) / both.sum(axis=1), rtol=1e-6
                )
            if np.isnan(variables["lp"][at]).all():
                assert np.isnan(variables["connectivity"][at]).all()
                assert np.isnan(variables["connectivity_at"][:, block.row, expert]).all()
                assert (variables["label"][at] == 0).all()
                continue
            core = labels.supernodes(variables["lp"][at], 0.01)
            written = np.abs(write[:, core]).sum(axis=1)
            support = np.argsort(-written, kind="stable")[:8]
            np.testing.assert_allclose(
                variables["connectivity"][at], np.abs(write)[support].sum(axis=0) / np.abs(write).sum(axis=0), rtol=1e-6
            )
            mass += written
        previous = np.argsort(-mass, kind="stable")[:8]
    # Rounding aside, redundancy and its labels are those of the same core.
    assert (found.core_rho, found.dropped) == (content.core_rho, ())


def test_a_table_that_does_not_fit_the_checkpoint(experts):
    content, weights, _ = experts

    def broken(**changes):
        block = content.blocks[0]
        tensors = (*block.tensors[:2], dataclasses.replace(block.tensors[2], **changes))
        return dataclasses.replace(content, blocks=(dataclasses.replace(block, tensors=tensors), *content.blocks[1:]))

    for changes, message in (
        ({"tensor": "nothing"}, "no tensor 'nothing'"),
        ({"axis": 0}, "channels 0 to 95 of axis 0"),
        ({"start": 5}, "channels 5 to 100"),
        ({"step": 2}, "channels 0 to 190"),
        ({"axis": None}, "axis None"),
        ({"axis": 3}, "axis 3"),
        ({"role": "up"}, "0 write tensors"),
    ):
        with pytest.raises(ModelError, match=message):
            relabelled_with_weights(broken(**changes), content.labels, weights)


def test_weights_of_another_model(tiny_atlas, tiny_checkpoint):
    with pytest.raises(ModelError, match="not the model that was measured"):
        StoredWeights.of(ModelSource(tiny_checkpoint("gpt2")), read(tiny_atlas("llama")).model)


def test_command_writes_over_its_input_only_when_told(path, capsys):
    before = path.read_bytes()
    assert main(["label", str(path), "--rho", "0.05"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["label", str(path)]) == 2
    assert "no setting to change" in capsys.readouterr().err
    assert path.read_bytes() == before
    content = read(path)
    assert main(["label", str(path), "--rho", "0.05", "--gamma", "3", "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "changed" in printed.out
    assert "still refer to the top 0.01" in printed.err
    found = read(path)
    assert found.labels == with_settings(content, rho=0.05, gamma=3.0)
    (line,) = found.producer.history
    assert line["labels"]["rho"] == 0.05
    assert main(["label", str(path), "--rho", "0.01", "--gamma", "8", "--overwrite"]) == 0
    assert_same_arrays(read(path), content)


def test_command_json(path, tmp_path, capsys):
    assert main(["label", str(path), "--support", "16", "--eta", "0.3", "-o", str(tmp_path / "b.h5"), "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert main(["validate", str(tmp_path / "b.h5")]) == 0
    assert "dropped read_connectivity" in printed.err
    old, new = read(path), read(tmp_path / "b.h5")
    assert (data["labels"]["support_size"], data["dropped"], data["core_rho"]) == (16, [*OF_SUPPORT], 0.01)
    assert len(data["layers"]) == len(new.blocks)
    moved = sum(
        int((mine.variables["label"] != theirs.variables["label"]).sum())
        for mine, theirs in zip(old.stacks, new.stacks, strict=True)
    )
    assert sum(row["moved"] for row in data["layers"]) == moved > 0
    assert sum(row["halo"] for row in data["layers"]) == sum(
        int((stack.variables["label"] == schema.LABEL_HALO).sum()) for stack in new.stacks
    )


def test_command_with_weights_loads_nothing_heavy(tiny_atlas, tiny_checkpoint, tmp_path, capsys):
    path, output = str(tiny_atlas("llama")), str(tmp_path / "b.h5")
    arguments = ["label", path, "--rho", "0.1", "--model", str(tiny_checkpoint("llama")), "-o", output]
    assert not heavy_imports("chanfmt.cli.main", arguments)
    assert main([*arguments, "--overwrite"]) == 0
    assert main(["validate", output]) == 0
    assert "the protection factor is 1 everywhere" in capsys.readouterr().err
    with chanfmt.open(output) as atlas:
        assert atlas.core_rho == 0.1
        assert atlas.producer.history[-1]["weights"] == atlas.model.fingerprint


def test_command_refuses_a_damaged_file(path, capsys):
    raw = bytearray(path.read_bytes())
    raw[raw.index(read(path).stacks[0].variables["sum_q2"].tobytes()) + 9] ^= 4
    path.write_bytes(raw)
    assert main(["label", str(path), "--rho", "0.05", "--overwrite"]) == 2
    assert "does not match" in capsys.readouterr().err
    assert path.read_bytes() == raw
