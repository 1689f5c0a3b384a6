"""A verdict in the record and the card of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import surgery
from chanfmt.base.text import json_text
from chanfmt.models.source import ModelSource
from surgery.result.card import is_edited, model_card
from surgery.result.evaluated import take_evaluation
from surgery.result.judge import put_verdict
from surgery.result.result import check_unchanged, open_result
from surgery.result.verdict import AnswerPair, TextLoss, judged

if TYPE_CHECKING:
    from pathlib import Path

LOSSES = (TextLoss("notes.txt", 99, 2.0, 2.25, 0.1, 0.4, True), TextLoss("other.txt", 99, 3.0, 3.0, None, None, False))
ANSWERS = (AnswerPair("Why?", "Because | of [this](x).", "I do\nnot know."),)


@pytest.fixture
def result(tiny_checkpoint: Any, tiny_atlas: Any, tmp_path: Path) -> Path:
    surgery.prune(tiny_checkpoint("llama"), tiny_atlas("llama"), tmp_path / "cut", to="90%")
    found = surgery.evaluate([tiny_checkpoint("llama"), tmp_path / "cut"], "pydoc", seq_len=64, max_tokens=64)
    (tmp_path / "evaluation.json").write_text(json_text(found.to_json()))
    return tmp_path / "cut"


def test_the_verdict_is_in_the_record_and_the_card_and_stays_there(result: Path, tmp_path: Path) -> None:
    report = open_result(result).report
    evaluated = take_evaluation(tmp_path / "evaluation.json", ModelSource(result).fingerprint, report.applied.fingerprint)
    verdict = judged(LOSSES, ANSWERS)
    put_verdict(result, verdict, evaluated)
    found = open_result(result)
    check_unchanged(found)
    assert found.report.verdict == verdict
    assert found.evaluated == evaluated
    card = (result / "README.md").read_text()
    assert not is_edited(card)
    assert "**Verdict: usable after healing.** The largest loss above the dense model's is +0.250 nats per token" in card
    assert "| Why? | Because \\| of \\[this\\](x). | I do not know. |" in card
    # A push writes the card again, from the record.
    assert model_card(found.report, result.name, found.evaluated) == card
    # The same verdict again changes nothing, and a card that somebody edited stays.
    times = [(result / name).stat().st_mtime_ns for name in ("surgery.json", "evaluation.json", "README.md")]
    put_verdict(result, verdict, evaluated)
    assert [(result / name).stat().st_mtime_ns for name in ("surgery.json", "evaluation.json", "README.md")] == times
    (result / "README.md").write_text(card + "mine\n")
    put_verdict(result, judged(LOSSES[1:]), evaluated)
    assert (result / "README.md").read_text() == card + "mine\n"
    assert open_result(result).report.verdict == judged(LOSSES[1:])
