"""What an evaluation says of one model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base import html
from chanfmt.base.text import perplexity_text

if TYPE_CHECKING:
    from surgery.evaluation.answers import Answer
    from surgery.evaluation.perplexity import BlockLosses, Comparison
    from surgery.evaluation.protocol import EvaluationTokens
    from surgery.evaluation.tasks import TaskResult


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of one model.

    Attributes:
        model: Name of the model, as given.
        fingerprint: Fingerprint of the checkpoint (`chanfmt.models.safetensors.fingerprint`); None for a model that
            was passed in memory.
        parameters: Number of parameters; a tied parameter counts once.
        tokens: The tokens that the model was evaluated on.
        losses: Loss of every block of tokens.
        comparison: Comparison with the first model; None for the first model itself, and if the tokens differ.
        before: Token ids that the tokenizer puts before a text, such as BOS.
        with_bos: Losses on the same tokens if every block begins with ``before``; None if the tokenizer adds none.
        seconds: Time in forward passes, in seconds.
        tokens_per_second: Speed after the first block, because a device warms up in the first block; the speed of the
            first block if there is only one.
        peak_memory_bytes: Largest memory use while the blocks ran, including the weights; None if the system does not
            record it.
        memory: What ``peak_memory_bytes`` is: ``rss`` of the process, or ``cuda`` for what torch allocated on the GPU.
        host_peak_memory_bytes: Largest resident set of the process while the blocks ran, on a GPU too; None if the system does
            not record it.
        cut: What ``surgery.json`` in the model's directory says of the removed channels; None without such a file.
        tasks: Results of lm-eval.
        answers: Answers to the prompts.
    """

    model: str
    fingerprint: str | None
    parameters: int
    tokens: EvaluationTokens
    losses: BlockLosses
    comparison: Comparison | None
    before: tuple[int, ...]
    with_bos: BlockLosses | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    memory: str
    host_peak_memory_bytes: int | None
    cut: dict[str, Any] | None
    tasks: tuple[TaskResult, ...] = ()
    answers: tuple[Answer, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Evaluation of {self.model!r}: perplexity {perplexity_text(self.perplexity)} over {len(self.tokens.ids):,} tokens>"
        )

    def _repr_html_(self) -> str:
        bits = self.bits_per_byte
        rows = [
            ["parameters", f"{self.parameters:,}"],
            ["perplexity", perplexity_text(self.perplexity)],
            *([["perplexity with BOS", perplexity_text(self.with_bos.perplexity)]] if self.with_bos else []),
            ["nats per token", f"{self.losses.mean:.4f}"],
            ["standard error", "-" if math.isnan(self.losses.standard_error) else f"{self.losses.standard_error:.4f}"],
            ["bits per byte", "-" if bits is None else f"{bits:.4f}"],
            ["tokens", f"{len(self.tokens.ids):,}"],
        ]
        return html.table([self.model, ""], rows)

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL per predicted token; infinity beyond float64."""
        return self.losses.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """Summed NLL of the predicted tokens in bits, per UTF-8 byte of their text; None if the bytes are not known."""
        size = self.tokens.predicted_bytes
        return float(self.losses.nll.sum()) / (math.log(2) * size) if size else None

    def to_json(self, seed: int) -> dict[str, Any]:
        """The entry of ``models`` that ``surgery eval --json`` prints. ``seed`` is the seed of the bootstrap."""
        tokens, losses = self.tokens, self.losses
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "text_tokens": tokens.text_tokens,
            "tokens": len(tokens.ids),
            "tokens_sha256": tokens.sha256,
            "predicted": int(losses.predicted.sum()),
            "predicted_bytes": tokens.predicted_bytes,
            "blocks": len(losses.nll),
            "nll": losses.mean,
            "nll_standard_error": losses.standard_error,
            "perplexity": losses.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bos_tokens": list(self.before),
            "nll_with_bos": self.with_bos.mean if self.with_bos else None,
            "perplexity_with_bos": self.with_bos.perplexity if self.with_bos else None,
            "against_first": _comparison_data(self.comparison, seed) if self.comparison else None,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": self.memory,
            "host_peak_memory_bytes": self.host_peak_memory_bytes,
            "cut": self.cut,
            "tasks": [asdict(result) for result in self.tasks],
            "answers": [asdict(answer) for answer in self.answers],
        }


def _comparison_data(comparison: Comparison, seed: int) -> dict[str, Any]:
    ratio, low, high = comparison.ratio
    return {
        "nll_difference": comparison.difference,
        "nll_difference_interval": [comparison.low, comparison.high],
        "perplexity_ratio": ratio,
        "perplexity_ratio_interval": [low, high],
        "interval": f"percentile bootstrap over blocks, paired, {comparison.confidence:.0%}",
        "blocks": comparison.blocks,
        "resamples": comparison.resamples,
        "seed": seed,
    }
