"""Refit the routed experts of a block, and dense FFNs beside them, each on its own tokens, with the weights that the router gives.

The routing is that of the cut model. Where the block adds what its units write, all units are fitted together, such that the cut
block gives the output of the dense block. Some blocks do more with it (a norm follows). There, each unit is fitted by itself to
what it wrote with all its channels, on what reaches it in the cut model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from chanfmt.base.errors import ModelError
from surgery.cut.checkpoint.patch import as_stored
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.recovery.adapt import adapt, evaluate, total
from surgery.recovery.folds import fold_places
from surgery.recovery.joint import Equations, Rows, fit_again, fit_jointly, squared_error
from surgery.recovery.options import LayerRecovery
from surgery.recovery.precision import full_products
from surgery.recovery.routed import Routed
from surgery.recovery.targets import InBlock, check_finite_states, inverse_square, rows_of
from surgery.recovery.writes import Write, Writes, is_close

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chanfmt.models.ffn import FFN
    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.streaming.chain import Call, Chain
    from chanfmt.models.streaming.spool import Spool
    from surgery.planning.plan import BlockPlan
    from surgery.recovery.folds import Batch
    from surgery.recovery.joint import JointFit
    from surgery.recovery.options import Refit

    Group = tuple[int, bool]


class Run(Protocol):
    """The pass through the model that a fit is a part of."""

    chain: Chain
    index: CheckpointIndex
    dtype: str | None
    spool: Spool
    options: Refit
    batches: list[Batch]
    roles: dict[str, tuple[str, ...]]
    progress: Callable[[int], object]

    def pass_on(self, number: int, stream: str, calls: list[Call]) -> None:
        """Run a block on all hidden states of a stream."""

    def get(self, key: str, place: int) -> torch.Tensor:
        """What the spool keeps of a batch, on the device of the model."""


class JointFitting:
    """The fit of several FFNs of one block, which is loaded. Routed experts count as one FFN.

    For batch b and FFN p, the spool holds what `surgery.recovery.joint` reads: ("left", b) and ("weights", b), and under
    ("inputs", b, p), ("token", b, p) and ("gain", b, p) the rows of its units.

    Attributes:
        check: Hidden states of the checked tokens behind the fitted block.
    """

    def __init__(
        self,
        run: Run,
        number: int,
        cut: Sequence[tuple[BlockPlan, FFN]],
        calls: list[Call],
        trial: Call,
        check: torch.Tensor,
    ) -> None:
        self.run = run
        self.number = number
        self.blocks = [block for block, _ in cut]
        self.calls = calls
        self.trial = trial
        self.check = check
        self.device = run.chain.device
        self.routed = Routed(run.chain, number, [(ffn, block.kept) for block, ffn in cut])
        self.name = ", ".join(block.module for block in self.blocks)
        self.adapts = run.options.method == "block"
        self.adds = self._adds()
        self.priors = [
            weight if bias is None else torch.cat([weight, torch.zeros_like(weight[..., :1])], 2)
            for weight, bias in zip(self.routed.weights, self.routed.biases, strict=True)
        ]
        self.everything = range(len(run.batches))
        self.inside, self.outside = fold_places(run.batches)
        self.shapes = [(prior.shape[0], prior.shape[2]) for prior in self.priors]
        # The input that stands for the bias has the size of the activations, as in a dense FFN.
        self.constants = [0.0] * len(cut)
        self.counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self.needed: dict[int, float] = {}

    def done(self) -> list[LayerRecovery]:
        """Fit, keep the weights, and pass the hidden states of the cut model on."""
        run = self.run
        run.pass_on(self.number, "dense", self.calls)
        for place, batch in enumerate(run.batches):
            self._gather(place)
            run.progress(len(batch.ids))
        with full_products():
            fit = fit_jointly(self._equations, self.inside, self.outside, self.shapes)
        result = self._adapted(fit) if self.adapts else self._fitted(fit)
        self._finish(result.write)
        sources = run.options.by_source(result.errors)
        return [
            LayerRecovery(
                block.layer_index,
                block.module,
                result.before,
                result.after,
                result.fit.condition if math.isfinite(result.fit.condition) else None,
                result.fit.damping,
                result.held_out,
                result.held_out_before,
                result.epoch,
                sources,
                *_evidence(block, rows),
            )
            for block, rows in zip(self.blocks, result.fit.sums.rows, strict=True)
        ]

    def _fitted(self, fit: JointFit) -> _Result:
        """The least-squares solution on all tokens, with the penalty that the held-out tokens chose."""
        errors = self._errors(fit.changes, self.everything)
        held_out = self._share(errors, self.outside)
        if self.outside:
            with full_products():
                fit = fit_again(self._equations, self.everything, fit, self.outside)
        nothing = [torch.zeros_like(change) for change in fit.changes]
        before, after = (
            self._share(self._errors(changes, self.everything), self.everything) or 0.0 for changes in (nothing, fit.changes)
        )
        return _Result(fit, self._writes(fit), before, after, held_out, self._by_group(errors))

    def _adapted(self, fit: JointFit) -> _Result:
        """All weights of the units, adapted from the solution on the fitted tokens. Units with few tokens keep that solution."""
        run, batches = self.run, self.run.batches
        target = InBlock(run, self.routed, self.calls)
        before = evaluate(target, batches, self.inside, self.routed.prior())
        self.routed.narrow(self.trial, self.check)
        free = tuple(
            (rows >= weight.shape[2]).to(self.device) for rows, weight in zip(fit.sums.rows, self.routed.weights, strict=True)
        )
        start = Writes(self._writes(fit).parts, free)
        # In float32: the code of some classes adds what experts wrote to states in the dtype of the model.
        adapted = adapt(target, batches, self.routed.read_leaves(free), start, self.number, run.progress)
        errors = adapted.errors
        return _Result(
            fit,
            adapted.write,
            total(before, target, batches, self.inside),
            total(errors, target, batches, self.inside),
            total(errors, target, batches, self.outside) if self.outside else None,
            errors,
            adapted.held_out_before,
            adapted.epoch,
        )

    def _adds(self) -> bool:
        """Whether the block adds what its units write, each row times a weight, to the states of the tokens."""
        passed = self.routed.passed(self.trial, self.check)
        if passed is None:
            return False
        prior = self.routed.prior()
        _, output = self.routed.run(self.trial, self.check, prior)
        equations = Equations(passed.rows, rows_of(torch.zeros_like(output)), torch.zeros(0))
        update = equations.output([part.weight for part in prior.parts])
        return is_close(rows_of(output) - rows_of(passed.without), update, output)

    def _gather(self, place: int) -> None:
        """Put the equations of a batch into the spool."""
        run, call, hidden = self.run, self.calls[place], self.run.get("cut", place)
        dense = rows_of(run.get("dense", place))
        check_finite_states(self.name, hidden, dense)
        if self.adds:
            passed = self.routed.passed(call, hidden)
            if passed is None:
                raise ModelError(f"the block of {self.name} does not add what its experts write on every text")
            rows = passed.rows
            needed, weights = dense - rows_of(passed.without), inverse_square(dense)
            if not self.adapts:
                run.spool.put(("cut", place), passed.without)
        else:
            rows, needed = self.routed.own(call, hidden)
            weights = inverse_square(needed) if len(needed) else needed.new_zeros(0)
        check_finite_states(self.name, needed, *(part.inputs for part in rows))
        rows = tuple(self._biased(number, part) for number, part in enumerate(rows))
        left = needed - Equations(rows, needed, weights).output(self.priors)
        self.needed[place] = float((needed.square().sum(1) * weights).double().sum())
        run.spool.put(("left", place), left)
        run.spool.put(("weights", place), weights)
        for number, part in enumerate(rows):
            self.counts[place, number] = part.counts
            for key, values in (("inputs", part.inputs), ("token", part.token), ("gain", part.gain)):
                run.spool.put((key, place, number), values)

    def _biased(self, number: int, rows: Rows) -> Rows:
        """``rows`` with a constant as one more input if the write projection has a bias. The fit finds what is added to the bias."""
        if self.routed.biases[number] is None:
            return rows
        if not self.constants[number] and len(rows.inputs):
            self.constants[number] = float(rows.inputs.square().mean().sqrt())
        constant = rows.inputs.new_full((len(rows.inputs), 1), self.constants[number])
        return Rows(torch.cat([rows.inputs, constant], 1), rows.token, rows.gain, rows.counts)

    def _equations(self, place: int) -> Equations:
        def kept(*key: object) -> torch.Tensor:
            return self.run.spool.get(key).to(self.device)

        rows = (
            Rows(
                kept("inputs", place, number),
                kept("token", place, number),
                kept("gain", place, number),
                self.counts[place, number],
            )
            for number in range(len(self.blocks))
        )
        return Equations(tuple(rows), kept("left", place), kept("weights", place))

    def _errors(self, changes: Sequence[torch.Tensor], places: Sequence[int]) -> dict[int, float]:
        """Weighted squared error of each batch."""
        return {place: squared_error(self._equations(place), changes) for place in places}

    def _share(self, errors: Mapping[int, float], places: Sequence[int]) -> float | None:
        """The error on ``places`` together, as a share of what has to be produced; None if there are no batches."""
        if not places:
            return None
        needed = math.fsum(self.needed[place] for place in places)
        return math.fsum(errors[place] for place in places) / needed if needed else 0.0

    def _by_group(self, errors: Mapping[int, float]) -> dict[Group, float]:
        """The error of each source and fold."""
        places: dict[Group, list[int]] = defaultdict(list)
        for place, batch in enumerate(self.run.batches):
            places[batch.group].append(place)
        return {group: self._share(errors, found) or 0.0 for group, found in places.items()}

    def _writes(self, fit: JointFit) -> Writes:
        parts = []
        for number, change in enumerate(fit.changes):
            found = self.priors[number] + change.float()
            if self.routed.biases[number] is None:
                parts.append(Write(found))
            else:
                parts.append(Write(found[..., :-1].contiguous(), found[..., -1] * self.constants[number]))
        return Writes(tuple(parts))

    def _finish(self, found: Writes) -> None:
        """Keep the fitted weights, and pass the cut model's hidden states through them, rounded as the checkpoint stores them."""
        run = self.run
        reads = self.routed.reads() if self.adapts else [{} for _ in self.blocks]
        parts, rounded = [], []
        for number, (block, write) in enumerate(zip(self.blocks, found.parts, strict=True)):
            dtypes = {item.role: stored_dtype(run.index.tensors[item.tensor], run.dtype) for item in block.tensors}
            values = {"weight": as_stored(write.weight, dtypes["write"])}
            shift, bias = None, self.routed.biases[number]
            if write.shift is not None and bias is not None:
                values["bias"] = as_stored(bias.cpu() + write.shift.cpu(), dtypes["write_bias"])
                shift = values["bias"].to(self.device, torch.float32) - bias
            rounded.append({role: as_stored(rows, dtypes[role]) for role, rows in reads[number].items()})
            parts.append(Write(values["weight"].to(self.device, torch.float32), shift))
            for role, tensor in (values | rounded[-1]).items():
                run.spool.put((role, block.name), tensor if block.n_experts else tensor[0])
            run.roles[block.name] = (*values, *rounded[-1])
        if self.adapts:
            self.routed.set_reads(rounded, self.check.dtype)
        self._pass_on(Writes(tuple(parts)))

    def _pass_on(self, write: Writes) -> None:
        run = self.run
        for place in range(len(run.batches)):
            before = run.get("cut", place)
            if self.adds and not self.adapts:
                update = self._equations(place).output([self._map(*item) for item in enumerate(write.parts)])
                after = before + update.to(before.dtype).reshape(before.shape)
            else:
                _, after = self.routed.run(self.calls[place], before, write)
            run.spool.put(("cut", place), after)
            for key in ("left", "weights"):
                run.spool.drop((key, place))
            for number in range(len(self.blocks)):
                for key in ("inputs", "token", "gain"):
                    run.spool.drop((key, place, number))
        with full_products():
            _, self.check = self.routed.run(self.trial, self.check, write)

    def _map(self, number: int, write: Write) -> torch.Tensor:
        """``write`` as a map of the inputs of the fit, (unit, outputs, inputs)."""
        if write.shift is None:
            return write.weight
        return torch.cat([write.weight, write.shift[..., None] / (self.constants[number] or 1.0)], 2)


@dataclass(frozen=True, eq=False)
class _Result:
    """What a fit ended with.

    Attributes:
        fit: The least-squares fit.
        write: The write projections.
        before, after, held_out, held_out_before, epoch: As in `LayerRecovery`.
        errors: Source and fold to the error.
    """

    fit: JointFit
    write: Writes
    before: float
    after: float
    held_out: float | None
    errors: Mapping[Group, float]
    held_out_before: float | None = None
    epoch: int | None = None


def _evidence(block: BlockPlan, rows: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of each expert, and the experts that had fewer tokens than channels; nothing for a dense FFN."""
    if not block.n_experts:
        return (), ()
    return tuple(rows.tolist()), tuple((rows < block.n_kept).nonzero().reshape(-1).tolist())
