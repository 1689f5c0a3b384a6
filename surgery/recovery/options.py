"""How the kept channels are refitted, and the outcome, as data. No torch, no model."""

from __future__ import annotations

import os
import re
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.data.shares import read_weights
from chanfmt.data.text import check_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block, SpecialTokens
    from surgery.planning.plan import PruningPlan

BIAS = "bias"
RECOVERIES = {
    "none": "the kept weights stay unchanged",
    BIAS: "the mean output of the removed channels becomes a bias, as in FLAP",
    "lstsq": "write projections are refitted by least squares, block by block, without labels",
    "block": "after lstsq, all weights of each FFN are adapted until its block gives the dense block's output, without labels",
    "distill": "after block, all FFNs are trained together until the model predicts what the dense model predicts, without labels",
}

REFITS = ("lstsq", "block", "distill")
"""Recoveries that run the model on tokens."""
STARTS = ("lstsq", "block")
"""Recoveries that ``distill`` can start from."""
GRADIENTS = ("block", "distill")
"""Recoveries that compute gradients."""
MAX_STEPS = 100_000
_COUNT = re.compile(r"([0-9]{1,12})([kKmM]?)")
_NAMED = 8
"""Experts of a layer that a summary names at most."""
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class RecoveryOptions:
    """Whether and how the kept channels are refitted.

    ``recover_text`` takes one text, or any iterable of texts.

    Raises:
        UsageError: ``recover_text`` holds something else.
    """

    recover: str = field(
        default="none",
        metadata={
            "help": "refit the kept channels, without labels: " + ", ".join(RECOVERIES),
            "metavar": "HOW",
        },
    )
    recover_device: str = field(
        default="auto",
        metadata={
            "help": "device of the refit: auto, cpu, cuda, cuda:1, ...",
            "metavar": "DEVICE",
        },
    )
    spool_limit: float = field(
        default=4.0,
        metadata={
            "help": "memory in GiB for hidden states of the refit; the rest goes to a file next to the output",
            "metavar": "GIB",
        },
    )
    recover_text: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "text to refit on, as atlas build --calib takes it: SOURCE or SOURCE=WEIGHT; repeat for a mixture (default: the atlas's calibration tokens)",
            "metavar": "SOURCE",
            "repeat": True,
        },
    )
    recover_tokens: str = field(
        default="128k",
        metadata={
            "help": "tokens to draw from --recover-text, such as 64k or 1M",
            "metavar": "N",
        },
    )
    checkpoint_every: float | None = field(
        default=None,
        metadata={
            "help": "seconds from one save of an unfinished refit to the next, from which the same command continues (0: after "
            "every block, or every step of distill; inf: never; default: as often as costs at most 2%% of the run time, in runs over 30 seconds)",
            "metavar": "SECONDS",
        },
    )
    recover_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps of --recover distill (default: by the number of tokens)",
            "metavar": "N",
        },
    )
    recover_start: str = field(
        default="block",
        metadata={
            "help": f"what --recover distill starts from: {', '.join(STARTS)}",
            "metavar": "HOW",
        },
    )

    def __post_init__(self) -> None:
        texts = (self.recover_text,) if isinstance(self.recover_text, str | os.PathLike) else tuple(self.recover_text or ())
        for text in texts:
            if not isinstance(text, str | os.PathLike):
                raise UsageError(f"--recover-text takes text, not {text!r}", hint="write the name of a source, such as pydoc")
        object.__setattr__(self, "recover_text", tuple(os.fspath(text) for text in texts))
        object.__setattr__(self, "recover_tokens", str(self.recover_tokens))

    def check(self) -> None:
        """Raise `UsageError` for a value outside its range."""
        if self.recover not in RECOVERIES:
            raise unknown("recovery", self.recover, RECOVERIES)
        if self.recover_text and self.recover not in REFITS:
            raise UsageError(
                f"--recover-text has no effect on --recover {self.recover}", hint=f"add --recover {' or --recover '.join(REFITS)}"
            )
        if self.recover_text:
            read_weights(self.recover_text, "--recover-text")
        _ = self.token_count
        if self.checkpoint_every is not None and not self.checkpoint_every >= 0:
            raise UsageError(f"--checkpoint-every must be 0 or more seconds, not {self.checkpoint_every:g}")
        self._check_distillation()
        if not 0 <= self.spool_limit < 2**33:
            raise UsageError(f"--spool-limit must be 0 or more GiB, not {self.spool_limit:g}")

    def _check_distillation(self) -> None:
        if self.recover_start not in STARTS:
            raise unknown("start of a distillation", self.recover_start, STARTS)
        if self.recover_steps is not None and not 0 < self.recover_steps <= MAX_STEPS:
            raise UsageError(f"--recover-steps must be between 1 and {MAX_STEPS}, not {self.recover_steps}")
        given = [*(["--recover-steps"] if self.recover_steps is not None else [])]
        given += ["--recover-start"] if self.recover_start != "block" else []
        if given and self.recover != "distill":
            raise UsageError(f"{given[0]} has no effect on --recover {self.recover}", hint="add --recover distill")

    def spelled(self) -> str:
        """The name of the recovery, with the text and the steps that it was asked to use."""
        parts = [self.recover]
        if self.recover_text:
            parts += [*sorted(self.recover_text), str(self.token_count)]
        if self.recover_steps is not None:
            parts.append(f"{self.recover_steps} steps")
        if self.recover_start != "block":
            parts.append(f"from {self.recover_start}")
        return " ".join(parts)

    @property
    def token_count(self) -> int:
        """``recover_tokens`` as a number; k is 1,024 and M is 1,048,576. Raises `UsageError`."""
        found = _COUNT.fullmatch(self.recover_tokens)
        count = int(found[1]) * _FACTORS[found[2].lower()] if found else 0
        if not 0 < count < 2**40:
            raise UsageError(f"--recover-tokens must be a positive number such as 64k or 1M, not {self.recover_tokens[:40]!r}")
        return count


NO_RECOVERY = RecoveryOptions()
"""The recovery unless another is asked for."""
BEST_RECOVERY = "block"
"""The recovery with the smallest loss in our measurements (``docs/half.md``) of those that need one block in memory; `surgery shrink`
uses it."""


@dataclass(frozen=True, eq=False)
class BiasRecovery:
    """A recovery by biases, to be done.

    Attributes:
        means: Name of every FFN that the plan cuts to the mean activations of its channels, float64 (channels,).
        tokens: Number of calibration tokens behind the means.
    """

    means: Mapping[str, np.ndarray]
    tokens: int


@dataclass(frozen=True)
class RefitText:
    """Text to be drawn for a refit.

    Attributes:
        weights: Source to its weight in the mixture.
        sequences: Number of sequences of all sources.
        seq_len: Tokens of a sequence.
        special: Tokens that every sequence begins and ends with; None for those that the model's tokenizer adds.
    """

    weights: Mapping[str, float]
    sequences: int
    seq_len: int
    special: SpecialTokens | None = None


@dataclass(frozen=True, eq=False)
class Refit:
    """A refit on tokens, to be done.

    Attributes:
        tokens: Tokens of the fit, int32 (sequence, position); None if ``text`` is still to be drawn.
        device: Device of the refit.
        spool_bytes: Bytes of hidden states that are kept in memory.
        method: One of `REFITS`.
        source_of: Number of the source of each sequence, int32 (sequence,); None if all are of one source.
        sources: Names of the sources.
        text: Text that gives the tokens; None for the atlas's tokens.
        save_every: Seconds from one save of the unfinished refit to the next; None for as often as costs little.
        steps: For ``distill``, the number of steps; None for one that follows from the number of tokens.
        start: For ``distill``, the method that it starts from, one of `STARTS`.
    """

    tokens: np.ndarray | None
    device: str
    spool_bytes: int
    method: str = "lstsq"
    source_of: np.ndarray | None = None
    sources: tuple[str, ...] = ()
    text: RefitText | None = None
    save_every: float | None = None
    steps: int | None = None
    start: str = "block"

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources' names in reports."""
        return self.sources or ("the atlas's tokens",)

    def by_source(self, errors: Mapping[tuple[int, bool], float]) -> tuple[SourceError, ...]:
        """``errors``, of a source's number and whether its sequences are held out, with the sources' names."""
        return tuple(
            SourceError(name, errors.get((number, False)), errors.get((number, True)))
            for number, name in enumerate(self.source_names)
        )


Recovery = BiasRecovery | Refit
"""A recovery that is ready to be done."""


@dataclass(frozen=True)
class LayerRecovery:
    """What a refit did to one FFN.

    An error is the squared distance between the outputs of the cut and the dense model's block, as a share of the squared
    output that the FFN has to produce.

    Attributes:
        layer_index, module: The FFN.
        error_before, error_after: Error on the tokens of the fit with the kept weights, and with the fitted weights.
        condition: Estimated condition number of the damped second moments; None if it is not finite.
        damping: The penalty on the distance from the kept weights, as a share of the mean squared activation.
        held_out: Error on the held-out sequences: for ``lstsq``, of the fit without them; for ``block``, at the end. None if
            no sequence was held out.
        held_out_lstsq: For ``block``, the error on the held-out sequences of the least-squares solution that it starts from.
        epoch: For ``block``, the epoch that had the smallest error on the held-out sequences; 0 if least squares had it.
        sources: For each source of the tokens, the errors of the weights that ``held_out`` belongs to.
        expert_tokens: For routed experts, the number of tokens of the fit that reached each expert.
        few_tokens: Experts that fewer tokens reached than they have kept channels. They stay close to their old weights, and
            ``block`` adapts only the others.
    """

    layer_index: int
    module: str
    error_before: float
    error_after: float
    condition: float | None
    damping: float
    held_out: float | None = None
    held_out_lstsq: float | None = None
    epoch: int | None = None
    sources: tuple[SourceError, ...] = ()
    expert_tokens: tuple[int, ...] = ()
    few_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class SourceError:
    """Errors of one FFN on the tokens of one source, as in `LayerRecovery`.

    Attributes:
        source: Name of the source.
        fitted, held_out: Error on fitted, and on held-out sequences; None if there are none.
    """

    source: str
    fitted: float | None
    held_out: float | None


@dataclass(frozen=True)
class Distillation:
    """What a distillation did to the whole model.

    A divergence is KL(dense || cut) of the distributions of the next token, in nats, the mean over all positions. It is
    measured on the held-out sequences, and on as many of the fitted ones.

    Attributes:
        start: The method that it started from.
        steps: Steps that were made.
        step: The step that the weights are from, 0 for the start: the one with the smallest divergence on the held-out
            sequences.
        fitted_before, fitted_after: Divergence on fitted sequences at the start, and of the weights in the result.
        held_out_before, held_out_after: The same on the held-out sequences; None if no sequence was held out.
        sources: The same for each source of the tokens.
        history: Steps, and the divergences on the held-out sequences after them; None in place of one that is not finite.
    """

    start: str
    steps: int
    step: int
    fitted_before: float | None
    fitted_after: float | None
    held_out_before: float | None
    held_out_after: float | None
    sources: tuple[SourceDivergence, ...] = ()
    history: tuple[tuple[int, float | None], ...] = ()

    def summary(self) -> str:
        """The outcome in a few words, for people."""
        text = f"KL to the dense model {_number(self.fitted_before)} to {_number(self.fitted_after)} nats/token"
        if self.held_out_after is not None:
            text += f", {_number(self.held_out_before)} to {_number(self.held_out_after)} on held-out sequences"
        return f"{text} (step {self.step} of {self.steps}, after {self.start})"


@dataclass(frozen=True)
class SourceDivergence:
    """Divergences on the tokens of one source, as in `Distillation`; None if there are no such sequences."""

    source: str
    fitted_before: float | None
    fitted_after: float | None
    held_out_before: float | None
    held_out_after: float | None


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class RecoveryReport:
    """A recovery that was done.

    Attributes:
        method: A key of `RECOVERIES`.
        tokens: Number of calibration tokens of the fit.
        layers: One entry per FFN that was refitted, in model order; empty for ``bias``. For ``distill``, what its start did.
        logit_error: max|difference| / max|logits| between the written model and the fitted one (``lstsq``, ``block``,
            ``distill``) or the masked dense model with the biases (``bias``); None if it was not measured.
            For routed experts, see `surgery.cut.check.check_fitted`.
        distillation: What ``distill`` did.
    """

    method: str
    tokens: int
    layers: Sequence[LayerRecovery] = ()
    logit_error: float | None = None
    distillation: Distillation | None = None

    def to_json(self) -> dict[str, Any]:
        """The object ``recovery`` of ``surgery.json``."""
        return asdict(self)

    def summary(self) -> str:
        """One line on the outcome, for people."""
        if self.distillation is not None:
            return f"{self.method} on {self.tokens:,} tokens: {self.distillation.summary()}"
        if not self.layers:
            return f"{self.method}: {RECOVERIES[self.method]}, over {self.tokens:,} tokens"
        before = statistics.median(layer.error_before for layer in self.layers)
        after = statistics.median(layer.error_after for layer in self.layers)
        held_out = [layer.held_out for layer in self.layers if layer.held_out is not None]
        unseen = f", {statistics.median(held_out):.3g} on held-out sequences" if held_out else ""
        return (
            f"{self.method} on {self.tokens:,} tokens: output error {before:.3g} to {after:.3g}{unseen} "
            f"(median of {len(self.layers)} FFNs){self._few()}"
        )

    def _few(self) -> str:
        """The experts with too few tokens, as a clause; empty if there are none."""
        layers = [layer for layer in self.layers if layer.few_tokens]
        if not layers:
            return ""
        few, experts = (sum(len(getattr(layer, name)) for layer in self.layers) for name in ("few_tokens", "expert_tokens"))
        worst = max(layers, key=lambda layer: len(layer.few_tokens))
        named = ", ".join(map(str, worst.few_tokens[:_NAMED])) + (", ..." if len(worst.few_tokens) > _NAMED else "")
        return (
            f"; {few} of {experts} experts were reached by fewer tokens than they have channels and stay close to their old "
            f"weights (layer {worst.layer_index}: {named})"
        )


def plan_recovery(options: RecoveryOptions, atlas: Atlas, plan: PruningPlan) -> Recovery | None:
    """Prepare the recovery that ``options`` ask for from the tokens or sums of ``atlas``, the plan's atlas; None for none.

    Raises:
        UsageError: The recovery is unknown, or ``plan`` cuts an FFN that cannot be refitted.
        AtlasError: ``atlas`` is not the plan's, or holds no tokens or no sums.
    """
    options.check()
    if options.recover == "none":
        return None
    plan.check_atlas(atlas)
    experts = next((block for block in plan.blocks if block.is_cut and block.n_experts), None)
    if experts is not None and options.recover in (BIAS, "distill"):
        raise UsageError(
            f"--recover {options.recover} works on dense FFNs only, and {experts.module} has {experts.n_experts} routed experts",
            hint="use --recover lstsq, which refits each expert, or cut only the dense FFNs with --stack NAME",
        )
    if options.recover == BIAS:
        return BiasRecovery(
            {
                planned.name: _means(atlas, block)
                for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
                if planned.is_cut
            },
            atlas.calibration.tokens,
        )
    common: dict[str, Any] = {
        "device": options.recover_device,
        "spool_bytes": int(options.spool_limit * 2**30),
        "method": options.recover,
        "steps": options.recover_steps,
        "start": options.recover_start,
        "save_every": options.checkpoint_every,
    }
    record = atlas.calibration
    if options.recover_text:
        length = record.seq_len
        weights = read_weights(options.recover_text, "--recover-text")
        for source in weights:
            check_text(source)
        text = RefitText(weights, max(1, round(options.token_count / length)), length, record.special_tokens)
        return Refit(None, text=text, **common)
    tokens = record.token_ids
    if tokens is None or not len(tokens):
        raise AtlasError(
            f"{atlas.path} holds no calibration tokens, which --recover fits on",
            hint="add --recover-text SOURCE, or use the atlas as it was built from text, before atlas strip",
        )
    names = tuple(item.source for item in record.contributions)
    return Refit(tokens, source_of=np.asarray(record.source_of), sources=names, **common)


def _means(atlas: Atlas, block: Block) -> np.ndarray:
    stack = atlas.stacks[block.stack]
    tokens = float(stack.row("tokens", block.row))
    if not tokens:
        raise AtlasError(f"no calibration token reached {block.module}", hint="build the atlas on more text")
    return np.asarray(stack.row("sum_u", block.row), dtype=np.float64) / tokens
