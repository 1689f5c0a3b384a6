"""The joint least squares of several units: the normal equations of all of them, the penalty, and units without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.recovery.joint import PENALTIES, PENALTY, Equations, JointFit, Rows, error_of, fit_again, fit_jointly

SHAPES = [(4, 6), (1, 9)]
"""Four experts of 6 channels, and a dense FFN of 9 beside them."""
OUTPUTS = 5


def routed(random: np.random.Generator, tokens: int, experts: tuple[int, ...], noise: float = 0.3) -> Equations:
    """A batch in which each token reaches two of ``experts`` and the dense FFN. The wanted output is a linear map, and noise."""
    chosen = np.stack([random.permutation(experts)[:2] for _ in range(tokens)])
    token, _ = np.nonzero(chosen >= 0)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    expert, token = chosen.reshape(-1)[order], token[order]
    rows = []
    for units, (number, of_token) in zip(SHAPES, ((expert, token), (np.zeros(tokens, int), np.arange(tokens))), strict=True):
        rows.append(
            Rows(
                torch.from_numpy(random.normal(size=(len(number), units[1])).astype(np.float32)),
                torch.from_numpy(of_token),
                torch.from_numpy(random.uniform(0.2, 1, len(number)).astype(np.float32)),
                tuple(np.bincount(number, minlength=units[0]).tolist()),
            )
        )
    weights = torch.from_numpy(random.uniform(0.5, 2, tokens).astype(np.float32))
    truth = np.random.default_rng(7)
    maps = [torch.from_numpy(truth.normal(size=(units, OUTPUTS, inputs)).astype(np.float32)) for units, inputs in SHAPES]
    batch = Equations(tuple(rows), torch.zeros(tokens, OUTPUTS), weights)
    wanted = batch.output(maps) + noise * torch.from_numpy(random.normal(size=(tokens, OUTPUTS)).astype(np.float32))
    return Equations(batch.rows, wanted, weights)


def wide(batch: Equations) -> np.ndarray:
    """The weighted inputs of all units side by side, (token, all inputs)."""
    columns = []
    for rows, (units, inputs) in zip(batch.rows, SHAPES, strict=True):
        place = np.zeros((len(batch.weights), units, inputs))
        for unit, part in rows.units():
            place[rows.token[part].numpy(), unit] = (rows.inputs[part] * rows.gain[part, None]).numpy()
        columns.append(place.reshape(len(place), -1))
    return np.concatenate(columns, axis=1)


def flat(fit: JointFit) -> np.ndarray:
    """The changes of all units side by side, (outputs, all inputs)."""
    return np.concatenate([part.permute(1, 0, 2).reshape(OUTPUTS, -1).numpy() for part in fit.changes], axis=1)


def exact(batches: list[Equations], penalty: float) -> np.ndarray:
    """The normal equations of all units together, solved at once in float64."""
    inputs = np.concatenate([wide(batch) for batch in batches])
    wanted = np.concatenate([batch.left.double().numpy() for batch in batches])
    weights = np.concatenate([batch.weights.double().numpy() for batch in batches])[:, None]
    second = (inputs * weights).T @ inputs
    ends = np.cumsum([units * count for units, count in SHAPES])
    added = np.empty(len(second))
    for part, (stop, start) in enumerate(zip(ends, [0, *ends[:-1]], strict=True)):
        # The penalty is the squared length of so many average rows.
        rows = sum(len(batch.rows[part].inputs) for batch in batches)
        added[start:stop] = penalty * np.trace(second[start:stop, start:stop]) / rows
    return np.linalg.solve(second + np.diag(added), (inputs * weights).T @ wanted).T


def test_the_normal_equations_of_all_units_are_solved_together() -> None:
    random = np.random.default_rng(0)
    batches = [routed(random, 60, (0, 1, 2, 3)) for _ in range(4)]
    found = fit_jointly(batches.__getitem__, [0, 1, 2], [3], SHAPES)
    assert found.penalty in PENALTIES
    expected = exact(batches[:3], found.penalty)
    assert np.abs(flat(found) - expected).max() <= 1e-3 * np.abs(expected).max()
    again = fit_again(batches.__getitem__, range(4), found, [3])
    expected = exact(batches, found.penalty)
    assert np.abs(flat(again) - expected).max() <= 1e-3 * np.abs(expected).max()
    assert sum(int(rows.sum()) for rows in again.sums.rows) == 4 * 60 * 3


@pytest.mark.parametrize("noise", [0.1, 3.0, 300.0])
def test_the_penalty_is_the_best_one_for_what_was_held_out(noise: float) -> None:
    """Noise asks for a strong penalty."""
    random = np.random.default_rng(1)
    batches = [routed(random, 40, (0, 1, 2, 3), noise) for _ in range(6)]
    found = fit_jointly(batches.__getitem__, [0, 1], [2, 3, 4, 5], SHAPES)
    errors = {}
    for penalty in PENALTIES:
        solution = exact(batches[:2], penalty)
        left = [batch.left.double().numpy() - wide(batch) @ solution.T for batch in batches[2:]]
        errors[penalty] = sum(
            float((rest**2 * batch.weights.double().numpy()[:, None]).sum())
            for rest, batch in zip(left, batches[2:], strict=True)
        )
    assert errors[found.penalty] <= 1.05 * min(errors.values())
    assert {0.1: found.penalty <= 0.3, 3.0: 1 <= found.penalty <= 30, 300.0: found.penalty == 100}[noise]


def test_units_without_rows_do_not_change_and_few_rows_change_little() -> None:
    random = np.random.default_rng(2)
    batches = [routed(random, 50, (0, 1)), routed(random, 1, (1, 2))]
    found = fit_jointly(batches.__getitem__, [0, 1], [], SHAPES)
    assert found.penalty == PENALTY
    assert not found.changes[0][3].any()
    sizes = found.changes[0].square().sum((1, 2))
    assert 0 < sizes[2] < 0.2 * sizes[:2].min()
    # One row moves its unit along the row's own input only.
    assert torch.linalg.matrix_rank(found.changes[0][2], rtol=1e-4) == 1


@pytest.mark.parametrize("case", ["no inputs", "nothing wanted"])
def test_without_evidence_nothing_changes(case: str) -> None:
    batch = routed(np.random.default_rng(3), 30, (0, 1, 2, 3))
    if case == "no inputs":
        rows = tuple(Rows(torch.zeros_like(part.inputs), part.token, part.gain, part.counts) for part in batch.rows)
        batch = Equations(rows, batch.left, batch.weights)
    else:
        batch = Equations(batch.rows, torch.zeros_like(batch.left), batch.weights)
    found = fit_jointly(lambda place: batch, [0], [1], SHAPES)
    assert not any(bool(change.any()) for change in found.changes)
    assert np.isfinite([found.damping, found.condition, error_of(lambda place: batch, [0], found.changes)]).all()
