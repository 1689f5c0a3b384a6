"""The distillation of a cut model: never worse on the held-out sequences, written as it was trained, the same twice, resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ChanfmtError, ModelError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery import descent, distill
from surgery.recovery.divergence import differentiate, divergence
from surgery.recovery.halves import Halves
from surgery.recovery.options import Refit
from surgery.result.result import open_result
from tests.support import zoo
from tests.support.plans import planned, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from surgery.recovery.descent import State
    from surgery.result.record import Report


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps on few tokens."""
    monkeypatch.setattr(distill, "STEP_TOKENS", 80)


def refit(sequences: int = 24, **changes: object) -> Refit:
    ids = np.random.default_rng(3).integers(0, 90, (sequences, 20)).astype(np.int32)
    return Refit(ids, "cpu", **{"spool_bytes": 1 << 30, "method": "distill", "start": "lstsq"} | changes)


def half(number: int, ffn: object) -> int:
    return ffn.width // 2  # type: ignore[attr-defined]


def cut(
    directory: Path,
    output: str,
    given: Refit,
    options: CutOptions | None = None,
    keep: Callable[[int, object], int] = half,
) -> Report:
    plan = planned(directory / "model", keep)
    options = options or CutOptions(allow_padding=True)
    return apply_plan(plan, ModelSource(directory / "model"), directory / output, options, recovery=given)


def mean_divergence(dense: Path, cut: Path, ids: np.ndarray) -> float:
    """KL(dense || cut) over all positions, from the logits of stock code."""
    found = []
    for directory in (dense, cut):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            found.append(model(torch.from_numpy(ids).long()).logits.double().log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "opt", "gptj", "gemma2", "gemma3_text", "olmo2", "cohere"])
def test_it_is_never_worse_than_its_start_on_what_was_held_out(model_type: str, tmp_path: Path) -> None:
    """FFNs change and nothing else, stock code computes what was trained, and two runs give the same bits."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    given = refit()
    report = cut(tmp_path, "out", given)
    assert report.recovery is not None
    found = report.recovery.distillation
    assert found is not None
    assert report.recovery.logit_error < 1e-5
    assert found.step > 0
    assert found.held_out_after < found.held_out_before
    held, rest = given.tokens[7::8], np.delete(given.tokens, np.s_[7::8], axis=0)
    assert found.held_out_after == pytest.approx(mean_divergence(tmp_path / "model", tmp_path / "out", held), rel=1e-4)
    assert found.fitted_after == pytest.approx(mean_divergence(tmp_path / "model", tmp_path / "out", rest[:4]), rel=1e-4)
    start = cut(tmp_path, "start", refit(method="lstsq"))
    assert list(start.recovery.layers) == list(report.recovery.layers)
    assert found.held_out_before == pytest.approx(mean_divergence(tmp_path / "model", tmp_path / "start", held), rel=1e-4)
    names = {item.tensor for block in report.plan.blocks for item in block.tensors}
    before, after = read(tmp_path / "start"), read(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == names
    cut(tmp_path, "again", refit(spool_bytes=0))
    again = read(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not list(tmp_path.glob("*.partial"))
