"""The texts of `surgery shrink`: what is measured, what is held out from it, and a text of another kind."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.inputs import input_path
from chanfmt.base.narrate import say
from chanfmt.data.text import ALIASES, ARRAYS, FILES, JOINT, SELF, check_text, read_text
from surgery.cli.shrinking.options import NONE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from surgery.cli.shrinking.options import JudgeOptions, MeasureOptions

DEFAULT = "wikitext2"
HELD_OUT_SHARE = 10
"""One part in ten of a file is held out."""
_NAME_IT = "name a text of the same kind with --held-out SOURCE"


@dataclass(frozen=True)
class Texts:
    """Names of the texts, as ``--calib`` and ``--data`` take them.

    Attributes:
        calib: What the model is measured on; empty if an atlas is given.
        held_out: Text of the same kind that is not measured.
        other: Text of another kind; None for none.
        file: File that is split into the first two; None if they are sources of their own.
    """

    calib: str
    held_out: str
    other: str | None
    file: Path | None = None


def choose_texts(measure: MeasureOptions, judge: JudgeOptions, work: Path, measured: Iterable[str] = ()) -> Texts:
    """Decide the texts. Nothing is read or written.

    Args:
        work: Directory for the parts of a file.
        measured: Sources of a given atlas, as the atlas names them.

    Raises:
        UsageError: A text cannot be used, or nothing is held out from the calibration text.
        MissingPackageError: The package that reads a text is not installed.
    """
    calib, held_out, file = "" if measure.atlas else measure.calib or DEFAULT, judge.held_out, None
    path = input_path(calib)
    if measure.atlas:
        held_out = held_out or _of_atlas(tuple(measured))
    elif path.suffix in ARRAYS:
        raise UsageError(f"--calib {calib} holds inputs, and surgery shrink measures language models on text", hint="use a text")
    elif calib != SELF:
        check_text(calib)
    if held_out is None:
        if calib == SELF or "@" in calib:
            raise UsageError(f"--calib {calib} keeps nothing for evaluation", hint=_NAME_IT)
        if path.suffix in FILES:
            file, suffix = path, ".txt" if path.suffix == ".txt" else ".jsonl"
            calib, held_out = str(work / f"calibration{suffix}"), str(work / f"held-out{suffix}")
        else:
            held_out = calib
    if file is None:
        check_text(held_out)
    other = judge.other or _another(held_out)
    if other in (None, NONE):
        return Texts(calib, held_out, None, file)
    assert other is not None
    check_text(other)
    return Texts(calib, held_out, other, file)


def split_file(texts: Texts) -> None:
    """Write the two parts of the file that ``texts`` splits, unless they are there.

    Raises:
        UsageError: The file holds too little to be split.
    """
    if texts.file is None or (os.path.exists(texts.calib) and os.path.exists(texts.held_out)):
        return
    text = read_text(str(texts.file), "calibrate")
    if text.documents:
        rows = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in text.documents]
    else:
        rows = [row + JOINT for row in text.text.split(JOINT)]
        if len(rows) < HELD_OUT_SHARE:
            rows = text.text.splitlines(keepends=True)
    if len(rows) < HELD_OUT_SHARE:
        what = "documents" if text.documents else "lines"
        raise UsageError(f"{texts.file} has only {len(rows)} {what}, too few to hold some out", hint=_NAME_IT)
    first = len(rows) - len(rows) // HELD_OUT_SHARE
    for name, part in ((texts.calib, rows[:first]), (texts.held_out, rows[first:])):
        with atomic_file(Path(name), overwrite=True) as temporary:
            temporary.write_text("".join(part), encoding="utf-8")
    say(f"wrote {texts.calib} and {texts.held_out}: the last tenth of {texts.file} is held out")


def _of_atlas(measured: tuple[str, ...]) -> str:
    """The source whose evaluation part belongs to what an atlas was measured on."""
    known = {"pydoc/calibrate": "pydoc"} | {
        "/".join(part for part in (name, config, splits["calibrate"]) if part): alias
        for alias, (name, config, splits) in ALIASES.items()
    }
    found = {known.get(source) for source in measured}
    if len(found) != 1 or None in found:
        raise UsageError(
            f"the atlas was measured on {', '.join(measured) or 'inputs'}, and nothing tells which text of that kind is held out",
            hint=_NAME_IT,
        )
    return str(found.pop())


def _another(held_out: str) -> str | None:
    """A text of another kind, if one can be read here."""
    if held_out != "pydoc":
        return "pydoc"
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return None if HF_HUB_OFFLINE else "wikitext2"
