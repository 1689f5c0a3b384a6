"""`--stream` and `--memory recompute` against the build in memory, on stock tiny models saved as checkpoints."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from chanfmt.algebra.validate import validate
from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.building import build as building
from chanfmt.building import keeper, run_pass, stream
from chanfmt.building.options import BuildOptions
from chanfmt.building.statistics import FFNStatistics
from chanfmt.format.reader import Atlas
from chanfmt.format.records import LabelSettings
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from chanfmt.models.stored.layout import tensor_slices
from chanfmt.models.streaming.spool import Spool, Spooled
from chanfmt.models.streaming.streamed import open_streamed
from tests.support import zoo
from tests.support.builds import assert_equal, build, columns_of
from tests.support.heard import heard
from tests.support.refused import on_file_systems
from tests.support.tiny import CONFIGS, save_tiny

EXPERTS = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    **{name: (name, {}) for name in CONFIGS},
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**EXPERTS, "intermediate_size": 87, "head_dim": 6, "sliding_window": 16}),
    "mixtral": ("mixtral", {**EXPERTS, "intermediate_size": 44, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **EXPERTS,
            "intermediate_size": 87,
            "moe_intermediate_size": 28,
            "num_experts": 4,
            "shared_expert_intermediate_size": 20,
            "num_experts_per_tok": 2,
        },
    ),
}
SETTINGS = LabelSettings(rho=0.05, support_size=8)
TEXT = "".join(f"Line {number}: {number * number} is the square of {number}, {number % 7} its rest.\n" for number in range(400))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def options(tmp_path, text, name, **changes):
    values = {"sequences": 13, "seq_len": 24, "batch_size": "2", "dtype": "float64", "device": "cpu", "columns": "all"}
    return BuildOptions(str(tmp_path / "model"), str(tmp_path / name), calib=str(text), **(values | changes))


def is_valid(path):
    return not [finding for finding in validate(path) if finding.rule.severity == "error"]


def assert_same(first, second, tolerance):
    """Check that two atlases agree: labels exactly, every other number to ``tolerance`` of the largest in its array."""
    with Atlas.open(first) as one, Atlas.open(second) as other:
        a, b = one.content(), other.content()
    assert a.calibration.mean_loss == pytest.approx(b.calibration.mean_loss, rel=1e-6)
    assert a.calibration.sequence_sha256 == b.calibration.sequence_sha256
    assert a.model == b.model
    assert a.blocks == b.blocks
    assert [stack.name for stack in a.stacks] == [stack.name for stack in b.stacks]
    arrays = [(x.variables, y.variables) for x, y in zip(a.stacks, b.stacks, strict=True)]
    for ours, theirs in (*arrays, (columns_of(a), columns_of(b))):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            if np.issubdtype(values.dtype, np.integer):
                np.testing.assert_array_equal(values, theirs[name], err_msg=name)
                continue
            np.testing.assert_array_equal(np.isnan(values), np.isnan(theirs[name]), err_msg=name)
            scale = np.nanmax(np.abs(values), initial=0)
            np.testing.assert_allclose(values, theirs[name], rtol=tolerance, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(("dtype", "again"), [("float64", "stream"), ("float32", "recompute")])
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_build_in_memory(tmp_path, text, model, dtype, again):
    """On a CPU, all orders of a pass run the same operations, and give the same bits."""
    model_type, changes = MODELS[model]
    save_tiny(tmp_path / "model", model_type, **changes)
    memory = build(options(tmp_path, text, "memory.h5", dtype=dtype, memory="whole"), SETTINGS)
    streamed = build(options(tmp_path, text, "streamed.h5", dtype=dtype, stream=True), SETTINGS)
    spooled = build(options(tmp_path, text, "spooled.h5", dtype=dtype, memory=again, spool_limit=0.0), SETTINGS)
    assert_equal(memory, streamed)
    assert_equal(memory, spooled)
    assert is_valid(streamed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.h5", "model", "spooled.h5", "streamed.h5", "text.txt"]


@pytest.mark.parametrize(("dtype", "loss", "tolerance"), [("bfloat16", "auto", 1e-5), ("float64", "embedding", 1e-9)])
def test_equals_the_build_in_memory_in_half_precision_and_with_another_loss(tmp_path, text, dtype, loss, tolerance):
    save_tiny(tmp_path / "model", "llama")
    memory = build(options(tmp_path, text, "memory.h5", dtype=dtype, loss=loss), SETTINGS)
    streamed = build(options(tmp_path, text, "streamed.h5", dtype=dtype, loss=loss, stream=True, spool_limit=0.0), SETTINGS)
    assert_same(memory, streamed, tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_weights_and_places_are_those_of_the_loaded_model(tmp_path, model):
    model_type, changes = MODELS[model]
    save_tiny(tmp_path / "model", model_type, **changes)
    source = ModelSource(tmp_path / "model")
    index = source.index
    loaded = load_model(source, device="cpu")
    streamed = open_streamed(source, device="cpu")
    chain = streamed.chain
    assert streamed.ffns == find_ffns(loaded)
    assert [tensor_slices(chain.model, ffn, index) for ffn in streamed.ffns] == [
        tensor_slices(loaded, ffn, index) for ffn in streamed.ffns
    ]
    state = loaded.state_dict()
    seen = {name for name, value in chain.model.state_dict().items() if not value.is_meta}
    for number in range(len(chain)):
        with chain.loaded(number) as block:
            for name, value in block.state_dict(prefix=f"{chain.names[number]}.").items():
                assert torch.equal(value, state[name])
                seen.add(name)
        assert all(parameter.is_meta for parameter in block.parameters())
    assert seen == state.keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, chain.model.get_buffer(name))


def test_finished_layers_are_not_in_memory_when_the_atlas_is_written(tmp_path, text, monkeypatch):
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=6)
    original, written = building.write_atlas, []

    def write(content, path, **options):
        written.append(path.name)
        gc.collect()
        # The statistics of the current block, and of the block before it until the current one is finished.
        assert sum(type(item) is FFNStatistics for item in gc.get_objects()) <= 2
        for stack in content.stacks:
            assert all(isinstance(row, Spooled) for values in stack.variables.values() for row in values._rows)
        return original(content, path, **options)

    monkeypatch.setattr(building, "write_atlas", write)
    monkeypatch.setattr(keeper, "write_atlas", write)
    build(options(tmp_path, text, "out.h5", stream=True, spool_limit=0.0, checkpoint_every=0.0), SETTINGS)
    assert written == ["out.h5.partial"] * 6 + ["out.h5"]


def stopping_after(blocks):
    """`_Pass._back` with Ctrl-C in the middle of a block, when ``blocks`` blocks are finished."""
    original = stream._Pass._back

    def back(self, number, place, batch, call):
        if number == len(self.chain) - 1 - blocks and place == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, number, place, batch, call)

    return back


@pytest.mark.parametrize(
    ("model", "blocks", "order"), [("llama", 1, "stream"), ("llama", 2, "recompute"), ("mixtral", 1, "stream")]
)
def test_an_interrupted_build_goes_on_bit_for_bit(tmp_path, text, monkeypatch, model, blocks, order):
    model_type, changes = MODELS[model]
    save_tiny(tmp_path / "model", model_type, **changes)
    whole = build(options(tmp_path, text, "whole.h5", dtype="float32", stream=True), SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(stream._Pass, "_back", stopping_after(blocks))
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            build(options(tmp_path, text, "parts.h5", dtype="float32", memory=order), SETTINGS)
    kept = ["parts.h5.partial", f"parts.h5.partial.gradient-{3 - blocks}"]
    assert sorted(path.name for path in tmp_path.glob("parts*")) == kept
    with Atlas.open(tmp_path / "parts.h5.partial") as atlas:
        assert len(atlas.blocks) == blocks
    assert is_valid(tmp_path / "parts.h5.partial")
    with pytest.raises(UsageError, match=f"--memory was {order} and is whole"):
        build(options(tmp_path, text, "parts.h5", dtype="float32", memory="whole", resume=True), SETTINGS)
    # A build that is left free to choose goes on as it began.
    parts = build(options(tmp_path, text, "parts.h5", dtype="float32", resume=True, spool_limit=0.0), SETTINGS)
    assert_same(whole, parts, 0)
    assert not list(tmp_path.glob("parts.h5.*"))


def test_checkpoints_while_it_runs_and_a_lost_gradient(tmp_path, text, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    original = building.write_atlas

    def write(content, path, **options):
        if path.name == "out.h5":
            raise KeyboardInterrupt
        return original(content, path, **options)

    def back(self, number, place, batch, call):
        if number == 0:
            raise ModelError("broken")
        return stream_back(self, number, place, batch, call)

    stream_back = stream._Pass._back
    with monkeypatch.context() as patch:
        patch.setattr(stream._Pass, "_back", back)
        with pytest.raises(ModelError, match="broken"):
            build(options(tmp_path, text, "out.h5", stream=True, checkpoint_every=0.0), SETTINGS)
    gradients = list(tmp_path.glob("out.h5.partial.gradient-*"))
    assert [path.name for path in gradients] == ["out.h5.partial.gradient-1"]
    gradients[0].write_bytes(bytes(gradients[0].stat().st_size))
    with pytest.raises(ChanfmtError, match="has changed since the build wrote it"):
        build(options(tmp_path, text, "out.h5", stream=True, resume=True), SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_atlas", write)
        with pytest.raises(KeyboardInterrupt):
            build(options(tmp_path, text, "out.h5", stream=True), SETTINGS)
    monkeypatch.setattr(stream._Pass, "_forward", None)
    build(options(tmp_path, text, "out.h5", stream=True, resume=True), SETTINGS)
    assert is_valid(tmp_path / "out.h5")


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        (
            "albert",
            {"hidden_size": 36, "intermediate_size": 87, "num_hidden_layers": 3, "num_attention_heads": 6, "embedding_size": 20},
            "more than once",
        ),
        ("t5", {"d_model": 36, "d_ff": 87, "num_layers": 2, "num_heads": 6, "d_kv": 6}, "its encoder as well as each other"),
    ],
)
def test_refuses_a_model_that_is_not_a_chain(tmp_path, model_type, changes, why):
    import transformers

    from tests.support.tiny import VOCAB, tiny_tokenizer

    config = transformers.AutoConfig.for_model(model_type, vocab_size=VOCAB, pad_token_id=0, **changes)
    loader = transformers.AutoModelForSeq2SeqLM if model_type == "t5" else transformers.AutoModelForMaskedLM
    loader.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=why):
        open_streamed(ModelSource(tmp_path / "model"), device="cpu")


def test_refuses_state_that_passes_a_block_by(tmp_path):
    zoo.tiny("glm_moe_dsa").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"calls model\.layers\.1 with something that depends on other blocks"):
        open_streamed(ModelSource(tmp_path / "model"), device="cpu")


def test_refuses_a_checkpoint_that_lacks_a_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "model", "llama")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"the checkpoint lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        open_streamed(ModelSource(tmp_path / "model"), device="cpu")


def test_a_batch_that_does_not_fit_is_halved(tmp_path, text, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    counts = []
    original, measured = stream._Pass._back, stream.measure_streamed

    def back(self, number, place, batch, call):
        if number == 1 and batch.sequences > 1:
            raise torch.OutOfMemoryError("this batch does not fit")
        return original(self, number, place, batch, call)

    def measure(streamed, tokens, spool, *, progress, **rest):
        found = measured(streamed, tokens, spool, progress=counts.append, **rest)
        assert sum(counts) == stream.steps(streamed, len(tokens.ids))
        return found

    expected = build(options(tmp_path, text, "one.h5", stream=True, batch_size="1"), SETTINGS)
    monkeypatch.setattr(stream._Pass, "_back", back)
    monkeypatch.setattr(run_pass, "measure_streamed", measure)
    with heard() as said:
        assert_same(expected, build(options(tmp_path, text, "auto.h5", stream=True, batch_size="auto"), SETTINGS), 1e-9)
    assert any("out of memory with 2 sequences in a batch; starting over with 1" in line for line in said)
    with pytest.raises(ChanfmtError, match="out of memory with 2 sequences"):
        build(options(tmp_path, text, "two.h5", stream=True), SETTINGS)


@on_file_systems(full={"pwrite64": errno.ENOSPC})
def test_a_full_disk_is_said_with_the_way_out(tmp_path, text, kind):
    # The threads of torch did not come along into this child.
    torch.set_num_threads(1)
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(ChanfmtError, match=r"No space left on device\n.*--spool-limit"):
        build(options(tmp_path, text, "out.h5", stream=True, spool_limit=0.0), SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"calib": "self"}, "--calib self and --stream"),
        ({"device_map": "auto"}, "--device-map keeps all weights"),
        ({"spool_limit": -1.0}, "--spool-limit must be"),
        ({"memory": "whole"}, "--stream and --memory whole cannot be combined"),
        (
            {"stream": False, "memory": "recompute", "device_map": "auto"},
            "--memory recompute runs a model that lies on one device",
        ),
        ({"stream": False, "memory": "much"}, "unknown memory 'much'"),
    ],
)
def test_options_that_do_not_go_together(changes, why):
    with pytest.raises(UsageError, match=why):
        BuildOptions("model", "out.h5", **({"stream": True} | changes)).check()


def test_torchrun_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--stream runs in one process"):
        build(options(tmp_path, text, "out.h5", stream=True), SETTINGS)


def test_spool_keeps_within_its_limit_and_reuses_its_file(tmp_path):
    tensors = {
        (0, number): torch.randn(2, 3, 5, dtype=dtype)
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64, torch.float32))
    }
    with Spool(150, tmp_path) as spool:
        for key, tensor in tensors.items():
            spool.put(key, tensor)
        assert spool.in_memory == 120
        assert spool.on_disk == 60 + 240 + 120
        assert not list(tmp_path.iterdir())
        for key, tensor in tensors.items():
            assert torch.equal(spool.get(key), tensor)
        spool.drop((0, 2))
        spool.put((1, 0), tensors[0, 2])
        assert spool.on_disk == 420
        assert torch.equal(spool.get((1, 0)), tensors[0, 2])


def test_a_disk_without_room_for_the_block_inputs_is_said_before_they_are_laid_aside(tmp_path, text, monkeypatch):
    asked, held = [], []

    class Watched(Spool):
        def check_room(self, nbytes):
            assert self.on_disk == self.in_memory == 0
            asked.append(nbytes)
            super().check_room(nbytes)

        def __exit__(self, *exception):
            held.append(self.on_disk)
            super().__exit__(*exception)

    monkeypatch.setattr("chanfmt.building.build.Spool", Watched)
    model = save_tiny(tmp_path / "model", "llama")
    path = build(options(tmp_path, text, "out.h5", stream=True, spool_limit=0.0, dtype="float32"), SETTINGS)
    config = json.loads((model / "config.json").read_text())
    with Atlas.open(path) as atlas:
        tokens = atlas.calibration.token_ids.size
    assert asked == [4 * config["hidden_size"] * tokens * (config["num_hidden_layers"] + 1)]
    # The statistics come on top.
    assert held[0] > asked[0]
    free = shutil.disk_usage(tmp_path).free
    with Spool(1 << 30, tmp_path) as spool:
        spool.check_room(free + (1 << 29))
        with pytest.raises(ChanfmtError, match=r"MB are needed\n.*--spool-limit"):
            spool.check_room(2 * free + (2 << 30))


@on_file_systems(full={"pwrite64": errno.ENOSPC}, broken={"preadv": errno.EIO})
def test_a_disk_that_fails_is_said_for_every_command_with_a_spool(tmp_path, kind):
    """`atlas build --stream` and refits have spools; both have --spool-limit, and neither has the other's options."""

    def put_and_get():
        with Spool(0, tmp_path) as spool:
            spool.put("key", torch.ones(3))
            spool.get("key")

    with pytest.raises(ChanfmtError) as caught:
        put_and_get()
    assert str(tmp_path) in caught.value.message
    assert os.strerror(errno.ENOSPC if kind == "full" else errno.EIO) in caught.value.message
    assert "--stream" not in str(caught.value)
    assert kind == "broken" or "--spool-limit" in caught.value.hint
