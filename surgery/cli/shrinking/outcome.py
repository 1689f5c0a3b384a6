"""What the steps of `surgery shrink` found: the best cut, the losses, the answers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import parse_json
from chanfmt.base.text import one_line
from chanfmt.data.text import FILES
from surgery.experiments.results import read_rows
from surgery.experiments.stored import check_rows
from surgery.experiments.sweep import SWEEP_FORMAT
from surgery.experiments.sweep_plan import DENSE
from surgery.result.verdict import AnswerPair, TextLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.cli.shrinking.estimate import Estimate
    from surgery.cli.shrinking.steps import Places
    from surgery.result.result import Result
    from surgery.result.verdict import Verdict

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Candidate:
    """A cut that was tried: its method, its allocation, and its loss above the dense model's in nats per token."""

    method: str
    allocation: str
    recover: str
    above: float


@dataclass(frozen=True)
class Shrunk:
    """What a run of `surgery shrink` came to.

    Attributes:
        model: The model that was cut, as it was named.
        to: The size that was asked for.
        result: The smaller model, with the record of what was removed, written and checked.
        work: Directory with the steps' results.
        estimate: What the run was expected to take.
        steps: The steps in order, each with the keys ``step``, ``command`` and ``seconds``.
        tried: The cuts that were tried, the best first; empty if there was nothing to choose from.
        verdict: What the smaller model is good for, the losses on every text, and both models' answers.
        next: Name of what a person may want to do next to its command line.
    """

    model: str
    to: str
    result: Result
    work: Path
    estimate: Estimate
    steps: tuple[dict[str, Any], ...]
    tried: tuple[Candidate, ...]
    verdict: Verdict
    next: dict[str, str]

    def __fspath__(self) -> str:
        """The directory of the smaller model, so that this can take the place of a path."""
        return str(self.result.directory)

    def __repr__(self) -> str:
        return f"<Shrunk {one_line(self.model)} in {str(self.result.directory)!r}: {self.verdict.words}>"

    def to_json(self) -> dict[str, Any]:
        """The object that ``surgery shrink --json`` prints."""
        report = self.result.report
        return {
            "model": self.model,
            "to": self.to,
            "output": str(self.result.directory),
            "work": str(self.work),
            "estimate": self.estimate.to_json(),
            "steps": list(self.steps),
            "tried": [asdict(item) for item in self.tried],
            "cut": {"method": report.plan.method, "allocation": report.plan.allocation, "sparsity": report.plan.sparsity}
            | {"recover": report.recovery.method if report.recovery else "none"},
            "parameters": {"before": report.parameters_before, "after": report.parameters_after},
            "bytes": {"before": report.bytes_before, "after": report.bytes_after},
            "verdict": self.verdict.to_json(),
            "next": self.next,
        }


class _Against(msgspec.Struct):
    nll_difference_interval: tuple[float | None, float | None]


class _Answer(msgspec.Struct):
    prompt: str
    answer: str


class _Model(msgspec.Struct):
    nll: float
    predicted: int
    against_first: _Against | None
    answers: list[_Answer]


class _Evaluation(msgspec.Struct):
    data: str
    models: list[_Model]


def candidates(places: Places, methods: tuple[str, ...], allocations: tuple[str, ...]) -> list[Candidate]:
    """The cuts that were tried, the best first.

    Raises:
        UsageError: The rows of a sweep cannot be read.
    """
    found = []
    for allocation in allocations:
        path = places.tried(allocation) / "results.json"
        stored = read_rows(path, SWEEP_FORMAT)
        try:
            check_rows(stored.rows, ("method", "recover"))
        except ValueError as error:
            raise _damaged(path, error) from None
        dense = next((row["nll"] for row in stored.rows if row["method"] == DENSE), math.nan)
        found += [
            Candidate(row["method"], allocation, row["recover"], row["nll"] - dense)
            for row in stored.rows
            if row["method"] in methods
        ]
    return sorted(found, key=lambda item: item.above)


def read_evaluation(path: Path, *, calibrated: bool) -> tuple[TextLoss, tuple[AnswerPair, ...]]:
    """The loss on one text, and the answers if there are any.

    Raises:
        ChanfmtError: ``path`` is not the output of ``surgery eval --json`` for two models.
    """
    try:
        if file_size(path) > _MAX_BYTES:
            raise ValueError("it is too large")
        stored = parse_json(path.read_bytes(), _Evaluation)
        dense, result = stored.models
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    low, high = result.against_first.nll_difference_interval if result.against_first else (None, None)
    return TextLoss(_name(stored.data), result.predicted, dense.nll, result.nll, low, high, calibrated), tuple(
        AnswerPair(one.prompt, one.answer, two.answer) for one, two in zip(dense.answers, result.answers, strict=False)
    )


def candidate_rows(found: Sequence[Candidate]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people."""
    return ["tried", "allocation", "recovery", "above dense"], [
        [item.method, item.allocation, item.recover, f"{item.above:+.4f}"] for item in found
    ]


def _name(data: str) -> str:
    """The name of a text; a file is named without its directory."""
    return Path(data).name if data.endswith(FILES) else data


def _damaged(path: Path, error: Any) -> ChanfmtError:
    return ChanfmtError(f"{path} is damaged: {error}", hint="remove it, and run the same command again")
