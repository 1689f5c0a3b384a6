"""Put a verdict into the record and the card of a result."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import CheckError
from chanfmt.base.files import atomic_file
from chanfmt.base.narrate import say
from surgery.result.card import is_edited, model_card
from surgery.result.names import CARD_FILE, EVALUATION_FILE, REPORT_FILE
from surgery.result.result import open_result

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.result.evaluated import Evaluated
    from surgery.result.verdict import Verdict


def put_verdict(directory: Path, verdict: Verdict, evaluated: Evaluated) -> None:
    """Write ``verdict`` and the numbers of ``evaluated`` beside the result in ``directory``, and into its card.

    A card that somebody edited stays as it is. Writing the same verdict twice changes nothing.

    Raises:
        UsageError: There is no result in ``directory``.
        CheckError: Its card cannot be read.
        ChanfmtError: A file cannot be written.
    """
    result = open_result(directory)
    stored = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    _write_json(directory / REPORT_FILE, stored | {"verdict": verdict.to_json()})
    _write_json(directory / EVALUATION_FILE, evaluated.to_json())
    path = directory / CARD_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, ValueError) as error:
        raise CheckError(f"cannot read {path}: {error}") from None
    if text is not None and is_edited(text):
        say(f"{path} was edited, and does not get the verdict")
        return
    card = model_card(replace(result.report, verdict=verdict), directory.absolute().name, evaluated)
    if card != text:
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(card, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
