"""What a smaller model is good for, in words, by its loss above the dense model's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LIMITS = (
    (0.05, "usable as it is"),
    (0.5, "usable after healing"),
    (math.inf, "usable for continued training; not as it is"),
)
"""Largest loss above the dense model's, in nats per token, to the words for it. ``docs/shrinking.md`` says why these."""


@dataclass(frozen=True)
class TextLoss:
    """The loss of both models on one text.

    Attributes:
        text: Name of the text.
        tokens: Tokens that were predicted.
        dense, result: Nats per token of the dense model and of the smaller one.
        low, high: Ends of the 95% bootstrap interval of their difference; None for a single block.
        calibrated: Whether the text is held out from the text that the model was measured on.
    """

    text: str
    tokens: int
    dense: float
    result: float
    low: float | None
    high: float | None
    calibrated: bool

    @property
    def above(self) -> float:
        """Loss above the dense model's, in nats per token."""
        return self.result - self.dense


@dataclass(frozen=True)
class AnswerPair:
    """What the dense and the smaller model answer to one prompt."""

    prompt: str
    dense: str
    result: str


@dataclass(frozen=True)
class Verdict:
    """What the smaller model is good for.

    Attributes:
        words: One of the words in `LIMITS`.
        nats: The largest loss above the dense model's, over all texts, in nats per token.
        text: Name of the text that has it.
        losses: The losses on every text.
        answers: Answers side by side.
    """

    words: str
    nats: float
    text: str
    losses: tuple[TextLoss, ...]
    answers: tuple[AnswerPair, ...] = ()

    def sentence(self) -> str:
        """The verdict in a sentence, with the number behind it."""
        return (
            f"{self.words} ({self.nats:+.3f} nats per token against the dense model on {self.text}, a perplexity "
            f"{math.exp(min(self.nats, 700)):.2f} times as high)"
        )

    def to_json(self) -> dict[str, Any]:
        """The object ``verdict`` of ``surgery.json``, with the limits that the words come from."""
        limits = [{"up_to": None if math.isinf(limit) else limit, "words": words} for limit, words in LIMITS]
        return asdict(self) | {"limits": limits}


def judged(losses: tuple[TextLoss, ...], answers: tuple[AnswerPair, ...] = ()) -> Verdict:
    """The verdict that follows from the losses on at least one text: the worst text decides."""
    worst = max(losses, key=lambda loss: loss.above)
    words = next(words for limit, words in LIMITS if worst.above <= limit)
    return Verdict(words, worst.above, worst.text, losses, answers)


def loss_table(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Headings and one row for each text: nats per token of both models, and their difference."""
    headings = ["text", "tokens", "dense", "smaller", "difference", "95% interval"]
    return headings, [
        [
            loss.text + (" (held out)" if loss.calibrated else " (another text)"),
            f"{loss.tokens:,}",
            f"{loss.dense:.4f}",
            f"{loss.result:.4f}",
            f"{loss.above:+.4f}",
            "-" if loss.low is None or loss.high is None else f"{loss.low:+.4f} to {loss.high:+.4f}",
        ]
        for loss in verdict.losses
    ]
