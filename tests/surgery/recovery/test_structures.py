"""Refits of the ways in which real classes put an FFN into a block: norms around it, beside attention, fused, and in encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model
from chanfmt.models.run import run_text
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.chain import Chain
from surgery.cut.apply import apply_plan
from surgery.cut.matching import match_ffns
from surgery.experiments.masking import masked, refitted_weights
from surgery.recovery.options import Refit
from surgery.recovery.refit import refitted
from surgery.recovery.workplace import Workplace
from tests.support import zoo
from tests.support.plans import planned
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan


@dataclass(frozen=True)
class Structure:
    """How a class puts its FFN into a block.

    Attributes:
        block: Name of the first block.
        write: Name of the write projection in it.
        adds: Whether the block adds the FFN's output. Otherwise a norm follows.
        transposed: Whether the projection is stored as (inputs, outputs).
        family: Family of the class in `tests.support.zoo`.
    """

    block: str
    write: str
    adds: bool = True
    transposed: bool = False
    family: str = zoo.CAUSAL


STRUCTURES = {
    "llama": Structure("model.layers.0", "mlp.down_proj"),
    "phi3": Structure("model.layers.0", "mlp.down_proj"),
    "gpt2": Structure("transformer.h.0", "mlp.c_proj", transposed=True),
    "opt": Structure("model.decoder.layers.0", "fc2"),
    "olmo2": Structure("model.layers.0", "mlp.down_proj", adds=False),
    "gemma2": Structure("model.layers.0", "mlp.down_proj", adds=False),
    "gemma3_text": Structure("model.layers.0", "mlp.down_proj", adds=False),
    "gpt_neox": Structure("gpt_neox.layers.0", "mlp.dense_4h_to_h"),
    "cohere": Structure("model.layers.0", "mlp.down_proj"),
    "phi": Structure("model.layers.0", "mlp.fc2"),
    "falcon": Structure("transformer.h.0", "mlp.dense_4h_to_h"),
    "bert": Structure("bert.encoder.layer.0", "output.dense", adds=False, family=zoo.MASKED),
}


def refit(method: str, sequences: int = 24) -> Refit:
    ids = np.random.default_rng(3).integers(5, 90, (sequences, 20)).astype(np.int32)
    return Refit(ids, "cpu", 1 << 30, method)


ALIKE = ("phi3", "opt", "gemma2", "gpt_neox", "cohere")
"""Each has its block, its norms and its biases in common with another structure."""


@pytest.fixture(params=[*(name for name in STRUCTURES if name not in ALIKE), *repeated(*ALIKE)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Structure, PruningPlan]:
    """Name, structure, and a plan that halves every FFN of a tiny model in ``tmp_path / "model"``."""
    structure = STRUCTURES[request.param]
    zoo.tiny(request.param, structure.family).save_pretrained(tmp_path / "model")
    return request.param, structure, planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)


def loaded(directory: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def first_block(directory: Path, structure: Structure, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations, what the FFN writes, and the output of the first block, (token, feature) each."""
    model = loaded(directory)
    seen: dict[str, torch.Tensor] = {}
    block = model.get_submodule(structure.block)
    # Falcon adds the output of attention to this tensor in place.
    block.get_submodule(structure.write).register_forward_hook(
        lambda module, inputs, output: seen.update(u=inputs[0], y=output.clone())
    )
    block.register_forward_hook(lambda module, inputs, output: seen.update(h=output[0] if isinstance(output, tuple) else output))
    with torch.inference_mode():
        run_text(model, torch.from_numpy(ids).long())
    u, y, h = (seen[name].reshape(-1, seen[name].shape[-1]).double().numpy() for name in "uyh")
    return u, y, h


def weights_of(directory: Path, structure: Structure) -> tuple[np.ndarray, np.ndarray | None]:
    """The first block's write projection, (outputs, channels), and its bias."""
    projection = loaded(directory).get_submodule(f"{structure.block}.{structure.write}")
    matrix = projection.weight.detach().double().numpy()
    bias = None if projection.bias is None else projection.bias.detach().double().numpy()
    return (matrix.T if structure.transposed else matrix), bias


def test_least_squares_solves_the_normal_equations_and_stock_code_computes_what_was_fitted(
    case: tuple[str, Structure, PruningPlan], tmp_path: Path
) -> None:
    """The input of the first FFN is the same in both models, so its fit can be done by hand."""
    _, structure, plan = case
    given = refit("lstsq")
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=given)
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    u, y, h = first_block(tmp_path / "model", structure, given.tokens)
    prior, bias = weights_of(tmp_path / "model", structure)
    found, new_bias = weights_of(tmp_path / "out", structure)
    kept = plan.blocks[0].kept
    inputs, wanted, prior = u[:, kept], y, prior[:, kept]
    if bias is not None:
        # The bias is one more channel, whose activation has the size of the others. Every eighth sequence is held out.
        fitted = u.reshape(len(given.tokens), -1, u.shape[1])[np.arange(len(given.tokens)) % 8 != 7]
        constant = np.sqrt((fitted[..., kept] ** 2).mean())
        inputs = np.concatenate([inputs, np.full((len(u), 1), constant)], axis=1)
        prior = np.concatenate([prior, np.zeros((len(prior), 1))], axis=1)
        wanted = y - bias
        found = np.concatenate([found, (new_bias - bias)[:, None] / constant], axis=1)
    importance = 1 / ((h if structure.adds else y) ** 2).mean(1)
    second = (inputs * importance[:, None]).T @ inputs
    penalty = report.recovery.layers[0].damping * np.trace(second) / len(second)
    cross = (inputs * importance[:, None]).T @ wanted + penalty * prior.T
    expected = np.linalg.solve(second + penalty * np.eye(len(second)), cross).T
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["phi", "bert", *repeated("gemma2", "gpt_neox", "falcon")])
def test_block_is_never_worse_than_least_squares_on_what_was_held_out(name: str, tmp_path: Path) -> None:
    """`tests/surgery/recovery/test_block.py` has the other structures."""
    zoo.tiny(name, STRUCTURES[name].family).save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=refit("block", 40))
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    assert all(layer.held_out <= layer.held_out_lstsq for layer in report.recovery.layers)
    assert any(layer.epoch for layer in report.recovery.layers)


@pytest.mark.parametrize("method", ["lstsq", "block"])
def test_a_loaded_model_gets_the_fitted_weights_and_its_own_again(
    case: tuple[str, Structure, PruningPlan], method: str, tmp_path: Path
) -> None:
    """As a sweep does it: the fitted logits in place, and afterwards the same bits as before."""
    _, _, plan = case
    source = ModelSource(tmp_path / "model")
    model = load_model(source, dtype="float32", device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ffns = dict(enumerate(match_ffns(plan.blocks, find_ffns(model))))
    with refitted(plan, source, refit(method), Workplace(tmp_path)) as fitted:
        weights = {number: (block.kept, fitted.fitted(block.name)) for number, block in enumerate(plan.blocks)}
    removed = {}
    for number, block in enumerate(plan.blocks):
        removed[number] = np.ones(block.n_channels, dtype=bool)
        removed[number][block.kept] = False
    with torch.inference_mode(), refitted_weights(model, ffns, weights), masked(model, ffns, removed):
        found = run_text(model, fitted.ids)[0][0]
    assert (found - fitted.logits).abs().max() <= 1e-5 * fitted.logits.abs().max()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", ["lstsq", "block"])
def test_an_encoder_decoder_is_refused_with_its_reason(method: str, tmp_path: Path) -> None:
    zoo.tiny("t5", zoo.SEQ2SEQ).save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    with pytest.raises(ModelError, match="cannot be run block by block: its decoder's blocks read its encoder"):
        apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=refit(method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lstsq", "block"])
def test_no_text_passes_through_blocks_behind_the_last_cut_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it, only the tokens of the check run. Before the first one, only one stream does."""
    zoo.tiny("llama", "causal", num_hidden_layers=5).save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2 if number in (1, 2) else ffn.width)
    given = refit(method)
    run, passed = Chain.run, dict.fromkeys(range(5), 0)

    def counted(self: Chain, number: int, call: Any, hidden: torch.Tensor) -> torch.Tensor:
        # At most two sequences run to open the model and to check it. A batch holds all sequences of a fold.
        passed[number] += len(hidden) if len(hidden) > 2 else 0
        return run(self, number, call, hidden)

    monkeypatch.setattr(Chain, "run", counted)
    steps: list[int] = []
    totals: list[int] = []
    with refitted(plan, ModelSource(tmp_path / "model"), given, Workplace(tmp_path, totals.append, steps.append)):
        pass
    count = len(given.tokens)
    assert passed[0] == count
    assert passed[1] >= 2 * count
    assert passed[2] >= 2 * count
    assert passed[3] == passed[4] == 0
    assert sum(steps) == totals[0]
