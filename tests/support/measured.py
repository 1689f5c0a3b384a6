"""Tiny models, each with an atlas and a text, for sweeps and ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.building.options import BuildOptions
from chanfmt.format.reader import Atlas
from chanfmt.format.records import LabelSettings
from surgery.experiments.subject import Subject, open_subject
from tests.support.builds import build
from tests.support.tiny import tiny_tokenizer
from tests.support.zoo import tiny

if TYPE_CHECKING:
    from pathlib import Path

SEQ_LEN, TOKENS = 48, 200
"""Four blocks and a part of one."""


@dataclass(frozen=True)
class Tiny:
    """A checkpoint, its atlas, and a text."""

    model: Path
    atlas: Path
    text: Path

    def subject(self, **options: Any) -> tuple[Atlas, Subject]:
        atlas = Atlas.open(self.atlas)
        values = {"seq_len": SEQ_LEN, "max_tokens": TOKENS, "dtype": "float64"}
        return atlas, open_subject(atlas, str(self.model), str(self.text), **{**values, **options})

    def arguments(self, output: Path, *more: str) -> list[str]:
        """Command line behind the command's name."""
        return [
            str(self.atlas),
            "--model",
            str(self.model),
            "--data",
            str(self.text),
            "--seq-len",
            str(SEQ_LEN),
            "--max-tokens",
            str(TOKENS),
            "-o",
            str(output),
            "--quiet",
            *more,
        ]


def make_tiny(directory: Path, model_type: str) -> Tiny:
    model = directory / "model"
    tiny(model_type).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text = directory / "text.txt"
    lines = [f"The quick brown fox no. {number} jumps over {number * number} lazy dogs!" for number in range(60)]
    text.write_text("\n".join(lines), encoding="utf-8")
    options = BuildOptions(str(model), str(directory / "atlas.h5"), calib="pydoc", sequences=16, seq_len=64)
    return Tiny(model, build(options, LabelSettings(rho=0.1, eta=0.2, support_size=8)), text)


class Forwards:
    """Counts the forward passes of a subject's model, and can stop one as Ctrl-C would."""

    def __init__(self, subject: Subject, stop_at: int | None = None) -> None:
        self.count = 0
        self._stop_at = stop_at
        subject.model.base_model.register_forward_pre_hook(self._counted)

    def _counted(self, module: Any, inputs: Any) -> None:
        self.count += 1
        if self.count == self._stop_at:
            raise KeyboardInterrupt
