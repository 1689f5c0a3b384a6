"""The adaptation of whole FFNs: never worse on the held-out sequences, written as it was fitted, and the same twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery.options import Refit
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.result.record import Report


def refit(sequences: int = 40, *, spool_bytes: int = 1 << 30, **changes: object) -> Refit:
    ids = np.random.default_rng(3).integers(0, 90, (sequences, 20)).astype(np.int32)
    return Refit(ids, "cpu", spool_bytes, **{"method": "block"} | changes)


def cut(directory: Path, output: str, given: Refit) -> Report:
    plan = planned(directory / "model", lambda number, ffn: ffn.width // 2)
    return apply_plan(plan, ModelSource(directory / "model"), directory / output, recovery=given)


@pytest.mark.parametrize("model_type", ["llama", "gptj", "olmo2", *repeated("gpt2", "phi3", "opt", "gemma3_text", "cohere")])
def test_it_is_never_worse_than_least_squares_on_what_was_held_out(model_type: str, tmp_path: Path) -> None:
    """Reads and writes change and nothing else, stock code computes what was fitted, and two runs give the same bits."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit())
    assert report.recovery is not None
    assert report.recovery.method == "block"
    assert report.recovery.logit_error < 1e-5
    for layer in report.recovery.layers:
        assert layer.held_out <= layer.held_out_lstsq
        assert layer.error_after < layer.error_before
    assert any(layer.epoch > 0 for layer in report.recovery.layers)
    plain = cut(tmp_path, "plain", refit(method="lstsq"))
    names = {item.tensor for block in report.plan.blocks for item in block.tensors}
    before, after = read(tmp_path / "plain"), read(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= names
    assert any(("down" not in name and "proj.weight" in name) or "fc" in name or "dense" in name for name in changed)
    assert plain.plan.channels_kept == report.plan.channels_kept
    cut(tmp_path, "again", refit(spool_bytes=0))
    again = read(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_one_sequence_is_fitted_by_least_squares_alone(tmp_path: Path) -> None:
    """Nothing can be held out, so nothing says when to stop."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(1))
    cut(tmp_path, "plain", refit(1, method="lstsq"))
    assert [layer.epoch for layer in report.recovery.layers] == [0, 0]
    assert all(layer.held_out is None for layer in report.recovery.layers)
    found, expected = read(tmp_path / "out"), read(tmp_path / "plain")
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in found)


def test_each_source_has_its_errors(tmp_path: Path) -> None:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    sources = {"source_of": np.arange(40, dtype=np.int32) % 2, "sources": ("one", "two")}
    for method in ("lstsq", "block"):
        report = cut(tmp_path, method, refit(method=method, **sources))
        for layer in report.recovery.layers:
            assert [item.source for item in layer.sources] == ["one", "two"]
            low, high = sorted(item.held_out for item in layer.sources)
            assert low <= layer.held_out <= high
            assert all(item.fitted is not None for item in layer.sources)


def test_dead_channels_and_few_tokens(tmp_path: Path) -> None:
    """A channel that is always 0, and fewer tokens than channels, give finite weights that are no worse on the held-out tokens."""
    model = zoo.tiny("llama", "causal")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[0] = 0
    model.save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(2))
    assert all(layer.held_out <= layer.held_out_lstsq for layer in report.recovery.layers)
    assert all(bool(values.isfinite().all()) for values in read(tmp_path / "out").values())


def test_reads_are_written_beside_zero_channels(tmp_path: Path) -> None:
    """Layers of two widths share a config field, so the halves of a fused projection end with zero channels."""
    zoo.tiny("phi3", "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2 if number else ffn.width - 8)
    report = apply_plan(
        plan, ModelSource(tmp_path / "model"), tmp_path / "out", CutOptions(allow_padding=True, verify=False), recovery=refit()
    )
    assert len(report.padded) == 1
    assert any(layer.epoch for layer in report.recovery.layers)
    assert report.recovery.logit_error < 1e-5
