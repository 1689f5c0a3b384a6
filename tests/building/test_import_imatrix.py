"""An atlas from an importance matrix: the round trip, matrices made by hand with llama.cpp's package, and the older layout."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.imatrix import imatrix_entries
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.building.import_imatrix import imported
from chanfmt.building.options import BuildOptions
from chanfmt.cli.main import main
from chanfmt.format.records import LabelSettings
from chanfmt.format.writer import write_atlas
from chanfmt.hub.atlases import atlas_card
from chanfmt.hub.names import HubFile
from chanfmt.models.imatrix_file import read_imatrix
from chanfmt.models.source import ModelSource
from surgery.cli.main import main as surgery
from tests.support.browsing import open_app, press, text_of
from tests.support.builds import build
from tests.support.tiny import save_tiny

gguf = pytest.importorskip("gguf")
MOE = "qwen2_moe"
MOE_SIZES = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tiny_atlas, tmp_path_factory):
    """Function from a model type to its tiny checkpoint and an atlas of it."""
    made = {}

    def get(model_type):
        if model_type != MOE:
            return tiny_checkpoint(model_type), tiny_atlas(model_type)
        if not made:
            home = tmp_path_factory.mktemp("moe")
            model = save_tiny(home / "checkpoint", MOE, **MOE_SIZES)
            options = BuildOptions(str(model), str(home / "moe.h5"), calib="pydoc", sequences=4, seq_len=32)
            made[MOE] = model, build(options, LabelSettings(rho=0.03, support_size=8))
        return made[MOE]

    return get


def by_hand(path, entries, *, kind="imatrix", chunks=4, size=32, without=""):
    """An importance matrix in the layout that llama-imatrix publishes."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["calibration_datav3.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums).astype(np.float32))
        if without != name:
            writer.add_tensor(f"{name}.counts", np.atleast_1d(counts).astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def older(path, means, *, calls=3, ending=True):
    """An importance matrix in the older layout, written down from its description."""
    data = [struct.pack("<i", len(means))]
    for name, values in means.items():
        data += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, len(values))]
        data.append((np.asarray(values, dtype="<f4") * np.float32(calls)).tobytes())
    if ending:
        data += [struct.pack("<ii", calls, len("wiki.txt")), b"wiki.txt"]
    path.write_bytes(b"".join(data))
    return path


def entries_of(atlas_path, *, more=False):
    with chanfmt.open(atlas_path) as atlas:
        found = {entry.name: (entry.sums, entry.counts.ravel()) for entry in imatrix_entries(atlas)}
    if more:
        # Published matrices cover attention and the read projections too.
        found["blk.0.attn_q.weight"] = (np.ones(8), 128)
    return found


@pytest.mark.parametrize("model_type", ["llama", MOE])
def test_the_round_trip_keeps_activation_power(measured, tmp_path, model_type):
    model, atlas = measured(model_type)
    assert main(["export", str(atlas), "-o", str(tmp_path / "m.imatrix.gguf")]) == 0
    command = ["import-imatrix", str(tmp_path / "m.imatrix.gguf"), "--model", str(model)]
    assert main([*command, "-o", str(tmp_path / "a.h5")]) == 0
    assert [item.code for item in validate(tmp_path / "a.h5") if item.rule.severity == "error"] == []
    with chanfmt.open(atlas) as before, chanfmt.open(tmp_path / "a.h5") as after:
        assert [block.stack for block in before.blocks] == [block.stack for block in after.blocks]
        assert after.labels.score == "activation_power"
        assert after.model.fingerprint == before.model.fingerprint
        for name, stack in before.stacks.items():
            own = after.stacks[name]
            np.testing.assert_array_equal(own["tokens"], stack["tokens"])
            np.testing.assert_allclose(own["activation_power"], stack["activation_power"], rtol=3e-7)
            np.testing.assert_array_equal(own["write_norm"], stack["write_norm"])
            assert "lp" not in own
            top = np.argmax(np.nan_to_num(own["activation_power"], nan=-1), axis=-1)
            reached = own["tokens"] > 0
            assert (np.take_along_axis(own["label"], top[..., None], -1)[..., 0][reached] == 2).all()


def test_a_published_matrix(tiny_checkpoint, tiny_atlas, tmp_path):
    path = by_hand(tmp_path / "m.gguf", entries_of(tiny_atlas("llama"), more=True), chunks=32, size=32)
    content = imported(path, ModelSource(tiny_checkpoint("llama")))
    record = content.calibration
    assert (record.sequences, record.seq_len, record.contributions[0].source) == (32, 32, "calibration_datav3.txt")
    write_atlas(content, tmp_path / "a.h5")
    assert [item.code for item in validate(tmp_path / "a.h5") if item.rule.severity == "error"] == []


@pytest.mark.parametrize("model_type", ["llama", MOE])
@pytest.mark.parametrize("ending", [True, False])
def test_the_older_layout(measured, tmp_path, model_type, ending):
    model, atlas = measured(model_type)
    means = {
        name: np.where(counts[:, None] > 0, sums / np.maximum(counts[:, None], 1), 1).ravel()
        for name, (sums, counts) in entries_of(atlas).items()
    }
    path = older(tmp_path / "m.dat", means, ending=ending)
    content = imported(path, ModelSource(model), chunk_size=100)
    assert (content.calibration.sequences, content.calibration.seq_len) == (3, 100)
    assert content.calibration.contributions[0].source == ("wiki.txt" if ending else "the matrix does not name its text")
    write_atlas(content, tmp_path / "a.h5")
    assert [item.code for item in validate(tmp_path / "a.h5") if item.rule.severity == "error"] == []
    with chanfmt.open(atlas) as before, chanfmt.open(tmp_path / "a.h5") as after:
        for name, stack in before.stacks.items():
            reached = stack["tokens"] > 0
            np.testing.assert_allclose(
                after.stacks[name]["activation_power"][reached], stack["activation_power"][reached], rtol=1e-6
            )


def test_what_does_not_fit_is_refused_by_name(tiny_checkpoint, tiny_atlas, tmp_path, capsys):
    source = ModelSource(tiny_checkpoint("llama"))
    good = entries_of(tiny_atlas("llama"))
    first = next(iter(good))
    sums, counts = good[first]

    def refused(match, entries, **options):
        path = tmp_path / "x.gguf"
        path.unlink(missing_ok=True)
        with pytest.raises(UsageError, match=match):
            imported(by_hand(path, entries, **options), source)

    refused("has nothing for blk.0.ffn_down.weight", {name: value for name, value in good.items() if name != first})
    refused("channels there", good | {first: (sums[:, 1:], counts)})
    refused("not finite", good | {first: (np.full_like(sums, np.nan), counts)})
    refused("negative", good | {first: (-1 - sums, counts)})
    refused("different numbers of tokens", good | {first: (sums, counts + 1)})
    refused("not a whole number", {name: (value, number + 0.5) for name, (value, number) in good.items()})
    refused("no token was measured", {name: (value, 0 * number) for name, (value, number) in good.items()})
    refused("has no counts", good, without=first)
    refused("does not say that it is an importance matrix", good, kind="model")
    dat = older(tmp_path / "m.dat", {first: np.ones(7)})
    for damaged in (dat.read_bytes()[:-30], b"", b"\x00" * 64, b"\xff" * 64):
        dat.write_bytes(damaged)
        with pytest.raises(UsageError, match="is not an importance matrix"):
            read_imatrix(dat)
    whole = by_hand(tmp_path / "y.gguf", good).read_bytes()
    for cut in (30, 200, len(whole) - 100):
        (tmp_path / "y.gguf").write_bytes(whole[:cut])
        with pytest.raises((UsageError, ModelError)):
            read_imatrix(tmp_path / "y.gguf")
    capsys.readouterr()
    assert main(["import-imatrix", str(tmp_path / "none.gguf"), "--model", str(source.directory), "-o", str(tmp_path / "a")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def activations(tiny_checkpoint, tiny_atlas, tmp_path):
    path = by_hand(tmp_path / "m.gguf", entries_of(tiny_atlas("llama")), chunks=16, size=64)
    write_atlas(imported(path, ModelSource(tiny_checkpoint("llama"))), tmp_path / "a.h5")
    return tmp_path / "a.h5"


def test_commands_show_it_and_methods_name_what_is_missing(activations, tmp_path, capsys):
    assert main(["info", str(activations)]) == 0
    text = capsys.readouterr().out
    assert "none: the atlas holds no metric that needs a gradient" in text
    assert "act pow mass" in text
    assert main(["show", str(activations), "--layer", "0", "--top", "2"]) == 0
    assert "supernode" in capsys.readouterr().out
    assert main(["show", str(activations), "--layer", "0", "--channel", "1"]) == 0
    plan = ["plan", str(activations), "--sparsity", "0.25", "-o", str(tmp_path / "p.safetensors"), "--overwrite", "--method"]
    for method in ("activation", "wanda", "magnitude", "random"):
        assert surgery([*plan, method]) == 0
    for method, missing in (("scar-prot", "lp"), ("taylor", "taylor"), ("flap", "sum_u"), ("wanda-group", "wanda_group")):
        capsys.readouterr()
        assert surgery([*plan, method]) == 2
        said = capsys.readouterr().err
        assert f"the atlas holds no '{missing}'" in said
        # Nobody stripped the atlas.
        assert "strip" not in said


def test_the_card_that_a_push_writes_speaks_of_no_loss(activations):
    with chanfmt.open(activations) as atlas:
        card = atlas_card(atlas, HubFile("ann/a", file="a.h5"), ([], []))
    assert "The atlas holds no metric that needs a gradient of a loss." in card
    assert "its mean was" not in card
    assert "LP is the loss proxy" not in card
    assert "surgery prune hf://datasets/ann/a/a.h5 --sparsity 0.5 --method activation" in card


def test_it_does_not_merge(activations, tiny_atlas, tmp_path):
    with pytest.raises(AtlasError) as caught:
        chanfmt.merge([activations, tiny_atlas("llama")], tmp_path / "both.h5")
    assert "importance matrix" in caught.value.hint


def test_the_card_of_a_cut_by_it_does_not_speak_of_its_lp(activations, tiny_checkpoint, tmp_path):
    prune = ["prune", str(activations), "--model", str(tiny_checkpoint("llama")), "--sparsity", "0.5", "--method", "wanda"]
    assert surgery([*prune, "-o", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The atlas holds no LP" in card
    assert "highest LP" not in card


def test_a_dry_run_refuses_what_the_cut_would_refuse(activations, tiny_checkpoint, tmp_path, capsys):
    prune = ["prune", str(activations), "--model", str(tiny_checkpoint("llama")), "--sparsity", "0.5", "--method", "wanda"]
    for more, said in (
        (["--imatrix", str(tmp_path / "none")], "does not exist"),
        (["--format", "gguf"], "is not byte-level BPE"),
    ):
        assert surgery([*prune, *more, "--dry-run"]) == 2
        assert said in capsys.readouterr().err


async def test_the_browser_ranks_by_activation_power(activations):
    app = open_app(activations)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        assert "act pow" in text_of(app)
        await press(pilot, "enter")
        await pilot.pause()
        assert "super" in text_of(app)
