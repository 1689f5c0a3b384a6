"""The distillation of a cut model: never worse on the held-out sequences, written as it was trained, the same twice, resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery.distillation import descent
from surgery.recovery.distillation import run as distillation
from surgery.recovery.distillation.divergence import differentiate, divergence
from surgery.recovery.distillation.halves import Halves
from surgery.recovery.distillation.state_file import Before, StateFile
from surgery.recovery.options import RecoveryOptions, Refit
from surgery.recovery.precision import descent_dtype
from surgery.recovery.writes import Leaf
from surgery.result.result import open_result
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from surgery.result.record import Report

CLOSE = 1e-4 if descent_dtype(torch.device("cpu")) == torch.float32 else 5e-3
"""Relative difference of a divergence from that of float32, on this CPU."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps on few tokens."""
    monkeypatch.setattr(distillation, "STEP_TOKENS", 80)


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


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", *repeated("phi3", "opt", "gptj", "olmo2")])
def test_it_is_never_worse_than_its_start_on_what_was_held_out(model_type: str, tmp_path: Path) -> None:
    """The numbers of the report are those of stock code with the files of the start and of the result."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    given = refit()
    report = cut(tmp_path, "out", given)
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    found = report.recovery.distillation
    assert found is not None
    held, rest = given.tokens[7::8], np.delete(given.tokens, np.s_[7::8], axis=0)
    start = cut(tmp_path, "start", refit(method="lstsq"))
    assert list(start.recovery.layers) == list(report.recovery.layers)
    for name, before, after in (
        ("start", found.held_out_before, found.fitted_before),
        ("out", found.held_out_after, found.fitted_after),
    ):
        assert before == pytest.approx(mean_divergence(tmp_path / "model", tmp_path / name, held), rel=CLOSE)
        assert after == pytest.approx(mean_divergence(tmp_path / "model", tmp_path / name, rest[:4]), rel=CLOSE)
    assert found.held_out_after == min(loss for _, loss in found.history) <= found.held_out_before
    assert (found.held_out_after < found.held_out_before) == (found.step > 0)


def test_ffns_are_trained_and_nothing_else(tmp_path: Path) -> None:
    """Two runs give the same bits, and leave no other file."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit())
    assert report.recovery.distillation.step > 0
    cut(tmp_path, "start", refit(method="lstsq"))
    names = {item.tensor for block in report.plan.blocks for item in block.tensors}
    before, after = read(tmp_path / "start"), read(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    cut(tmp_path, "again", refit(spool_bytes=0))
    again = read(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "start", "again"}


def test_a_bfloat16_checkpoint_is_trained_in_float32_and_rounded_once(tmp_path: Path) -> None:
    """What was measured on the held-out sequences is what the rounded weights compute."""
    zoo.tiny("llama", "causal").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    given = refit()
    report = cut(tmp_path, "out", given)
    assert {values.dtype for values in read(tmp_path / "out").values()} == {torch.bfloat16}
    found = report.recovery.distillation
    assert found.step > 0
    assert found.held_out_after < found.held_out_before
    expected = mean_divergence(tmp_path / "model", tmp_path / "out", given.tokens[7::8])
    assert found.held_out_after == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_zero_channels_stay_zero(model_type: str, tmp_path: Path) -> None:
    """Every FFN keeps another number of channels, and one config field sets the width of all of them."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(96), keep=lambda number, ffn: ffn.width // 2 - 5 * number)
    assert report.padded
    assert report.recovery.logit_error < 1e-5
    assert report.recovery.distillation.step > 0
    tensors = read(tmp_path / "out")
    for block in report.padded:
        zeros = report.applied.widths[block.name] - block.n_kept
        for item in block.tensors:
            if item.axis is not None and tensors[item.tensor].ndim == 2:
                channels = tensors[item.tensor].abs().sum(1 - item.axis)
                assert int((channels == 0).sum()) == zeros * (2 if "gate_up" in item.tensor else 1)


@pytest.mark.parametrize("saves", [2, *repeated(1, 4)])
def test_a_killed_distillation_goes_on_where_it_was(saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command after SIGKILL does not refit again, and its result has the same bits as one that was never killed."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    whole = cut(tmp_path, "whole", refit(save_every=0.0))
    child = multiprocessing.get_context("fork").Process(target=_die_after, args=(tmp_path, saves))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("distill-*.partial"))) == 1
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "refitted", None)
        again = cut(tmp_path, "out", refit(save_every=0.0))
    assert again.recovery == whole.recovery
    expected, found = read(tmp_path / "whole"), read(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list(tmp_path.glob("*distill*"))


def _die_after(directory: Path, saves: int) -> None:
    """Cut, and kill this process with the lock and all after ``saves`` states were written."""
    save, left = StateFile.save, [saves]

    def save_and_die(self: StateFile, *given: object) -> None:
        save(self, *given)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    StateFile.save = save_and_die  # type: ignore[method-assign,assignment]
    cut(directory, "out", refit(save_every=0.0))


def test_a_damaged_or_foreign_state_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.ones(3, 2), torch.zeros(4)]
    state = descent.first_state([Leaf(values) for values in weights], 1.5)
    before = Before((), {0: 1.0}, {0: 1.5})
    file = StateFile(tmp_path / "distill-1.partial", "key", 0.0)
    file.save(state, before)
    found, early = file.load([torch.empty(3, 2), torch.empty(4)])
    assert torch.equal(found.weights[0], weights[0])
    assert (found.step, found.history, found.rates, early) == (state.step, state.history, state.rates, before)
    assert file.load([torch.empty(3, 2), torch.empty(5)]) is None
    assert StateFile(file.path, "other", 0.0).load(weights) is None
    assert "belongs to other work" in caplog.text
    file.path.write_bytes(file.path.read_bytes()[:-9])
    assert file.load(weights) is None
    assert "cannot be read" in caplog.text
    file.remove()
    assert file.load(weights) is None


def test_blocks_that_are_computed_again_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    cut(tmp_path, "one", refit())
    monkeypatch.setattr(distillation, "saves_activations", lambda needs, device: True)
    cut(tmp_path, "two", refit())
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_gradient_in_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain autograd through stock logits, in float64."""
    model = zoo.tiny("gemma2", "causal").double()
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    halves = Halves(model)
    wanted = model(ids).logits.detach().roll(1, 0).log_softmax(-1)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    found = model(ids).logits.log_softmax(-1)
    mean = (wanted.exp() * (wanted - found)).sum(-1).mean()
    expected = torch.autograd.grad(mean, weight)[0]
    model.requires_grad_(False)
    weight.requires_grad_(True)
    hidden = halves.hidden(ids)
    monkeypatch.setattr("surgery.recovery.distillation.divergence.CHUNK_BYTES", 4 * 4 * wanted.shape[-1])
    dense = hidden.detach().roll(1, 0)
    whole = differentiate(halves.logits, dense, hidden, wanted.shape[-1])
    assert whole == pytest.approx(mean.item(), rel=1e-5)
    assert divergence(halves.logits, dense, hidden.detach(), wanted.shape[-1]) == pytest.approx(18 * mean.item(), rel=1e-5)
    assert torch.allclose(weight.grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


class Bowl:
    """A loss with its minimum at 3, whose held-out part rises below ``turn``."""

    def __init__(self, values: torch.Tensor, turn: float) -> None:
        self.values = values
        self.turn = turn

    def differentiate(self, number: int) -> None:
        (self.values - 3).square().sum().backward()

    def held_out(self) -> float:
        return float((self.values - self.turn).detach().square().sum())


def test_the_descent_stops_when_the_held_out_loss_rises() -> None:
    values = torch.nn.Parameter(torch.full((1,), 4.0))
    bowl, leaves = Bowl(values, 3.95), [Leaf(values)]
    state = descent.first_state(leaves, bowl.held_out())
    steps = []
    descent.descend(bowl, leaves, state, 5, 80, lambda state: steps.append(state.step))
    assert len(steps) == state.step < 80
    assert state.best_step == state.history[-descent.PATIENCE - 1][0] > 0
    assert (float(state.best[0]) - 3.95) ** 2 == pytest.approx(min(loss for _, loss in state.history), rel=0.01)
    assert float(values) == float(state.best[0])


def test_steps_that_are_too_large_are_halved_from_the_best_weights() -> None:
    """They would end the descent at its start otherwise."""
    values = torch.nn.Parameter(torch.full((1,), 3.01))
    bowl, leaves = Bowl(values, 3.0), [Leaf(values)]
    state = descent.first_state(leaves, bowl.held_out())
    state.rates = [2.0]
    descent.descend(bowl, leaves, state, 5, 80)
    losses = [loss for _, loss in state.history]
    assert losses[1] > losses[0]
    assert min(losses) < losses[0] / 4
    assert state.rates[0] < 2.0


def test_one_sequence_keeps_the_weights_of_the_start(tmp_path: Path) -> None:
    """Nothing can be held out, so nothing says when to stop."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(1))
    cut(tmp_path, "start", refit(1, method="lstsq"))
    found = report.recovery.distillation
    assert (found.steps, found.step, found.held_out_before, found.history) == (0, 0, None, ())
    out, start = read(tmp_path / "out"), read(tmp_path / "start")
    assert all(torch.equal(out[name], start[name]) for name in out)


def test_each_source_has_its_divergences(tmp_path: Path) -> None:
    """They are in the record, which reads back, and in the card."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(source_of=np.arange(24, dtype=np.int32) % 2, sources=("one", "two"), steps=3))
    found = report.recovery.distillation
    assert found.steps == 3
    assert [item.source for item in found.sources] == ["one", "two"]
    low, high = sorted(item.held_out_after for item in found.sources)
    assert low <= found.held_out_after <= high
    stored = open_result(tmp_path / "out").report.recovery
    assert json.dumps(stored.to_json()) == json.dumps(report.recovery.to_json())
    card = (tmp_path / "out" / "README.md").read_text()
    assert report.recovery.summary() in card
    assert "No gradient was computed" not in card
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["recovery"]["distillation"]["start"] == "lstsq"


def test_too_little_memory_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("surgery.recovery.distillation.memory.free_memory", lambda device: 1 << 20)
    with pytest.raises(ChanfmtError, match=r"needs about 0\.4 GB of memory .* and 0\.0 GB are available"):
        cut(tmp_path, "out", refit())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    zoo.tiny("bert", "masked").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="BertForMaskedLM is an encoder as configured") as error:
        cut(tmp_path, "out", refit())
    assert "--recover block" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recover_steps": 5}, "--recover-steps has no effect on --recover none"),
        ({"recover": "block", "recover_start": "lstsq"}, "--recover-start has no effect on --recover block"),
        ({"recover": "distill", "recover_steps": 0}, "--recover-steps must be between 1 and 100000, not 0"),
        ({"recover": "distill", "recover_start": "bias"}, "unknown start of a distillation 'bias'"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        RecoveryOptions(**options).check()  # type: ignore[arg-type]
