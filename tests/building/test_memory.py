"""The memory of a pass is predicted from short sequences, and decides the batch before anything is measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.base.errors import ChanfmtError
from chanfmt.base.memory import known_memory
from chanfmt.building import choose_batch as choosing
from chanfmt.building.measure import measure
from chanfmt.building.memory_probe import probe_in_memory, statistics_bytes
from chanfmt.building.plan import plan_build
from chanfmt.building.predicted_memory import Growth, Stage, choice_of, fitted, largest_batch, predicted
from chanfmt.building.statistics import FFNStatistics
from chanfmt.data.tokens import canonical
from chanfmt.format.records import MEMORY_PREDICTION
from chanfmt.hub.locate import locate_model
from chanfmt.models import load, room
from chanfmt.models.device_memory import free_memory
from chanfmt.models.distributed import Group
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.live_bytes import LiveBytes
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.source import ModelSource
from tests.support.builds import SETTINGS, assert_equal, build, request, stop_after
from tests.support.heard import heard
from tests.support.tiny import random_tokens, save_tiny, tiny_model
from tests.support.zoo import tiny

GROWTHS = [Growth(1000, 40, 0), Growth(0, 40, 2.5), Growth(7, 0, 3)]


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_growth_is_found_from_three_lengths(growth):
    found = fitted((16, 32, 64), [growth.at(1, length) for length in (16, 32, 64)])
    assert found.at(3, 512) == pytest.approx(growth.at(3, 512), rel=1e-6)


def test_a_stage_that_overtakes_another_does_not_count_as_growth_with_pairs():
    found = fitted((16, 32, 64), [max(3000, 100 * length) for length in (16, 32, 64)], pairs=False)
    assert found.per_pair == 0
    assert 100 * 512 <= found.at(1, 512) <= 1.1 * 100 * 512


def test_logits_are_held_in_chunks_and_not_together_with_the_work_of_a_block():
    stage = Stage(statistics=10, kept=Growth(per_token=2), working=Growth(per_token=1), logit_row=5, logit_rows=8)
    assert stage.at(1, 4).estimate == 10 + 8 + 20
    assert stage.at(1, 100).estimate == 10 + 200 + 100
    assert predicted([stage, Stage(weights=10**6)], 1, 4).weights == 10**6


def test_the_batch_is_halved_until_it_fits():
    stages = {"cpu": [Stage(kept=Growth(per_token=1e6))], "cuda:0": [Stage(kept=Growth(per_token=2e6))]}
    free = {"cpu": 10**12, "cuda:0": 10**9}

    def found(**more):
        return largest_batch(stages, 16, 100, free | more, {})

    assert (found().sequences, found().device, found().fits) == (4, "cuda:0", True)
    assert (found(cpu=10**8).sequences, found(cpu=10**8).device, found(cpu=10**8).fits) == (1, "cpu", False)
    assert found(**{"cuda:0": None}).sequences == 16
    assert "batch of 4 sequences: about 947 MB of 1.0 GB free" in found().text()
    # A CPU that is short of memory gives freed memory back at once, before a batch gets smaller.
    loose = largest_batch({"cpu": stages["cpu"]}, 16, 100, {"cpu": 2 * 10**9}, {}, tight=False)
    assert (loose.sequences, loose.tight) == (16, True)
    assert not largest_batch({"cpu": stages["cpu"]}, 16, 100, {"cpu": 10**10}, {}, tight=False).tight
    assert choice_of(stages, 16, 100, free, {}).prediction.activations == 3_200_000_000


@pytest.mark.parametrize(("vocabulary", "rows"), [(49152, 640), (128256, 256), (2**18, 128), (2**20, 32)])
def test_a_chunk_of_logits_has_a_multiple_of_128_rows(vocabulary, rows):
    loss = NextTokenLoss.__new__(NextTokenLoss)
    loss.head = torch.nn.Linear(4, vocabulary, bias=False, device="meta")
    assert loss.rows_at_once == rows


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_prediction_is_what_a_pass_takes(model_type):
    model = tiny(model_type) if model_type == "mixtral" else tiny_model(model_type)
    model.requires_grad_(False)
    ffns, tokens = find_ffns(model), canonical(random_tokens(24, 48).numpy())
    loss = NextTokenLoss(model, tokens.batch(0, 1, model))
    stages = probe_in_memory(model, ffns, tokens, rho=0.03, loss=loss)
    with LiveBytes() as counted:
        measurement = measure(model, ffns, tokens, rho=0.03, loss=loss, batch_size=3)
    assert predicted(stages["cpu"], 3, 48).estimate == pytest.approx(counted.peak["cpu"], rel=0.1)
    for ffn, found in zip(ffns, measurement.statistics, strict=True):
        assert statistics_bytes(ffn, 0.03, 48) == pytest.approx(found.nbytes, rel=0.02)


def test_live_bytes_count_each_storage_once_and_until_it_is_freed():
    before = torch.ones(1000)
    with LiveBytes() as counted:
        made = torch.zeros(500)
        view = made[3:].view(-1)
        before.add_(1)
        assert counted.live["cpu"] == 2000
        del made
        assert counted.live["cpu"] == 2000
        del view
        assert counted.live["cpu"] == 0
    assert counted.peak["cpu"] == 2000


def test_a_limit_of_a_container_counts(tmp_path):
    groups = tmp_path / "sys" / "fs" / "cgroup"
    group = groups / "job"
    group.mkdir(parents=True)
    in_group(tmp_path, "0::/job\n")
    for directory, limit in ((groups, "max"), (group, "1000000")):
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text("600000\n")
        (directory / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert known_memory(tmp_path) == 500000
    assert free_memory(torch.device("cpu")) > 1 << 20
    # Files that are read again and again are in the active list; the system drops them too.
    (group / "memory.stat").write_text("anon 5\ninactive_file 100000\nactive_file 50000\n")
    assert known_memory(tmp_path) == 550000


def test_an_older_container_counts_what_its_groups_hold(tmp_path):
    group = tmp_path / "sys" / "fs" / "cgroup" / "memory" / "job"
    group.mkdir(parents=True)
    in_group(tmp_path, "4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("1000000\n")
    (group / "memory.usage_in_bytes").write_text("600000\n")
    own, total = "inactive_file 1\nactive_file 2\n", "total_inactive_file 100000\ntotal_active_file 50000\n"
    (group / "memory.stat").write_text(own + total)
    assert known_memory(tmp_path) == 550000


def in_group(root, line):
    """Write ``/proc/self/cgroup`` below ``root``. The machine itself says nothing of its memory."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(line)
    assert known_memory(root / "proc") is None


@pytest.mark.parametrize(("order", "name"), [("auto", "in memory"), ("recompute", "recomputed"), ("stream", "streamed")])
def test_a_build_records_its_prediction_and_says_it(order, name, tiny_checkpoint, tmp_path):
    with heard() as said:
        path = build(request(tiny_checkpoint("llama"), tmp_path / "a.h5", memory=order, batch_size="auto"), SETTINGS)
    with chanfmt.open(path) as atlas:
        (line,) = atlas.producer.history
    found = line[MEMORY_PREDICTION]
    assert found["order"] == name
    assert found["sequences_in_batch"] == 3
    assert found["needed"] < found["free"]
    assert (found["weights"] > 0) == (order == "stream")
    assert (found["spool"] > 0) == (order != "auto")
    assert any(", batch of 3 sequences: about" in text for text in said)


def needed_of(path, order="in memory"):
    """Bytes that the build of an atlas was predicted to need, in the order that it must have chosen."""
    with chanfmt.open(path) as atlas:
        found = atlas.producer.history[0][MEMORY_PREDICTION]
    assert found["order"] == order
    return found["needed"]


def test_the_order_follows_from_what_is_free(tmp_path, monkeypatch):
    """The whole graph comes before the blocks one by one, and both come before weights that are read as needed."""
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=4)
    options = request(tmp_path / "model", tmp_path / "whole.h5", batch_size="auto", columns="none", spool_limit=0.0, sequences=9)
    whole = build(options, SETTINGS)
    # What is free when each order is tried: weights that are not loaded any more make room.
    needed = {"in memory": needed_of(whole)}
    for order, left in {"recomputed": [1000, 10**9], "streamed": [1000, 1000, 10**9]}.items():
        free = iter(left)
        monkeypatch.setattr(choosing, "free_memory", lambda *_, free=free: next(free))
        with heard() as said:
            path = build(dataclasses.replace(options, output=str(tmp_path / f"{order}.h5")), SETTINGS)
        needed[order] = needed_of(path, order)
        assert len([text for text in said if "block by block, with" in text or "whole graph, batch" in text]) == len(left)
        assert_equal(path, whole)
    assert needed["recomputed"] < needed["in memory"]
    monkeypatch.setattr(choosing, "free_memory", lambda *_: 1000)
    monkeypatch.setattr(choosing, "free_swap", lambda: 0)
    with pytest.raises(ChanfmtError, match="one sequence of 32 tokens does not fit on cpu") as caught:
        build(dataclasses.replace(options, output=str(tmp_path / "c.h5"), memory="whole"), SETTINGS)
    assert caught.value.hint.startswith("use --stream, --memory recompute, ")


def test_little_memory_makes_a_small_batch_or_none(tiny_checkpoint, tmp_path, monkeypatch):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", batch_size="auto", columns="none")
    whole = build(options, SETTINGS)
    with chanfmt.open(whole) as atlas:
        found = atlas.producer.history[0][MEMORY_PREDICTION]
    one = found["needed"] - (found["activations"] + found["working"]) * 7 // 6
    monkeypatch.setattr(choosing, "free_memory", lambda *_: one)
    with heard() as said:
        small = build(dataclasses.replace(options, output=str(tmp_path / "b.h5")), SETTINGS)
    assert any(", batch of 1 sequence: " in text for text in said)
    with chanfmt.open(whole) as ours, chanfmt.open(small) as theirs:
        name = next(iter(ours.stacks))
        np.testing.assert_allclose(ours.stacks[name]["lp"], theirs.stacks[name]["lp"], rtol=1e-4)
    monkeypatch.setattr(choosing, "free_memory", lambda *_: 1000)
    monkeypatch.setattr(choosing, "free_swap", lambda: 0)
    with pytest.raises(ChanfmtError, match="one sequence of 32 tokens does not fit on cpu") as caught:
        build(dataclasses.replace(options, output=str(tmp_path / "c.h5")), SETTINGS)
    assert caught.value.hint.startswith("use a smaller --seq-len, a smaller --spool-limit or ")
    assert not (tmp_path / "c.h5").exists()
    # Whoever gives a size gets it, with a note.
    plan = plan_build(dataclasses.replace(options, batch_size="1", overwrite=True), SETTINGS, locate_model)
    with heard() as said:
        assert choosing.choose_batch(plan, Group()).size == 1
    assert any("so it may not fit" in text for text in said)


def test_weights_that_do_not_fit_are_streamed_or_refused_before_they_are_read(tiny_checkpoint, tmp_path, monkeypatch):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", columns="none", sequences=8)
    monkeypatch.setattr(room, "free_memory", lambda *_: 1000)
    monkeypatch.setattr(room, "free_swap", lambda: 0)
    monkeypatch.setattr(load, "auto_class", lambda config: pytest.fail("the weights were read"))
    with heard() as said:
        path = build(options, SETTINGS)
    assert any(
        "of weights, and 0 MB free on cpu: one block's weights are read at a time, as with --stream" in text for text in said
    )
    with chanfmt.open(path) as atlas:
        assert atlas.producer.history[0][MEMORY_PREDICTION]["order"] == "streamed"
    for changes in ({"memory": "whole"}, {"calib": "self"}):
        with pytest.raises(room.NoRoomError, match=r"does not fit: .* of weights") as caught:
            build(dataclasses.replace(options, output=str(tmp_path / "b.h5"), **changes), SETTINGS)
        assert caught.value.hint == "use --stream (atlas build) or --dtype bfloat16"
    # Half of the bytes, and swap space, count.
    source = ModelSource(tiny_checkpoint("llama"))
    needed = room.room_for(source, torch.float32, torch.device("cpu"))
    assert needed.weights == 2 * room.room_for(source, torch.bfloat16, torch.device("cpu")).weights
    monkeypatch.setattr(room, "free_swap", lambda: needed.weights)
    room.check_room(source, torch.float32, torch.device("cpu"))


def test_a_build_that_continues_keeps_its_batch_and_its_prediction(tiny_checkpoint, tmp_path, monkeypatch):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", batch_size="auto", columns="none", checkpoint_every=0)
    stop_after(options, 3, monkeypatch)
    monkeypatch.setattr(choosing, "free_memory", lambda *_: 1000)
    path = build(dataclasses.replace(options, resume=True), SETTINGS)
    with chanfmt.open(path) as atlas:
        prediction, continued = atlas.producer.history
    assert set(prediction) == {MEMORY_PREDICTION}
    assert continued["resumed_at_sequence"] > 0


def test_statistics_are_counted_without_being_made():
    model = tiny_model("llama")
    (ffn, *_) = find_ffns(model)
    made = FFNStatistics(ffn, torch.device("cpu"))
    made.members[0].choose_core(0.03)
    assert statistics_bytes(ffn, 0.03, 0) == made.nbytes + 16 * len(made.members[0].core.candidates)
