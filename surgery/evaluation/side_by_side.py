"""The evaluations of several models on one text: as a sequence, as JSON, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from chanfmt.base import html
from chanfmt.base.text import perplexity_text
from surgery.evaluation.protocol import PROTOCOLS
from surgery.evaluation.tables import Table, evaluation_tables

if TYPE_CHECKING:
    from surgery.evaluation.measured import Evaluation


@dataclass(frozen=True, eq=False, repr=False)
class Evaluations(Sequence["Evaluation"]):
    """Evaluations in the order of the models; a sequence of `Evaluation`.

    Attributes:
        models: One evaluation per model. All but the first are compared with the first.
        data: Name of the text.
        protocol: Name of the protocol, a key of `surgery.evaluation.protocol.PROTOCOLS`.
        seq_len: Tokens in a block.
        max_tokens: Tokens of the text that were used at most; 0 means all.
        seed: Seed of the bootstrap.
    """

    models: tuple[Evaluation, ...]
    data: str
    protocol: str
    seq_len: int
    max_tokens: int
    seed: int

    def __len__(self) -> int:
        return len(self.models)

    @overload
    def __getitem__(self, index: int) -> Evaluation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Evaluation, ...]: ...
    def __getitem__(self, index: int | slice) -> Evaluation | tuple[Evaluation, ...]:
        return self.models[index]

    def __repr__(self) -> str:
        found = ", ".join(f"{item.model!r} {perplexity_text(item.perplexity)}" for item in self.models)
        return f"<Evaluations on {self.data!r}, perplexity: {found}>"

    def _repr_html_(self) -> str:
        lines = html.table([], [[line] for line in self.coverage()])
        return "".join([lines, *(html.table(*table) for table in self.tables())])

    def to_json(self) -> dict[str, Any]:
        """What ``surgery eval --json`` prints."""
        return {
            "data": self.data,
            "seq_len": self.seq_len,
            "max_tokens": self.max_tokens,
            "protocol": {"name": self.protocol, "statement": PROTOCOLS[self.protocol].statement},
            "models": [item.to_json(self.seed) for item in self.models],
        }

    def coverage(self) -> list[str]:
        """How much of the text the numbers are about: one line per tokenisation."""
        lines = []
        for item in {item.tokens.sha256: item for item in reversed(self.models)}.values():
            tokens, losses = item.tokens, item.losses
            size = "" if tokens.predicted_bytes is None else f" ({tokens.predicted_bytes:,} bytes)"
            blocks = f"{len(losses.nll):,} block{'' if len(losses.nll) == 1 else 's'} of {self.seq_len:,}"
            lines.append(
                f"{self.data}, protocol {self.protocol}: {len(tokens.ids):,} of {tokens.text_tokens:,} tokens in "
                f"{blocks}, {int(losses.predicted.sum()):,} predicted{size}"
            )
        return lines[::-1]

    def tables(self) -> list[Table]:
        """Headings and rows for people: the models; then comparisons, cuts, tasks and answers, if there are any."""
        return evaluation_tables(self.models)
