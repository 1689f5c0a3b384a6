"""What cuts cost where somebody measured it: the rows of ``measured.json``, which ``bench/expect.py`` writes. Data, no torch."""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "measured-cuts/1"
FILE = "measured.json"


@dataclass(frozen=True)
class Loss:
    """The loss of a cut model above that of its dense model, on one text.

    Attributes:
        text: Name of the text.
        domain: What the text is about, in a word or two.
        above: Difference in nats per token.
        low, high: Ends of its 95% interval, by a paired bootstrap over the blocks; None for a single block.
        dense: Nats per token of the dense model.
        tokens: Tokens that were evaluated.
        blocks: Blocks that they were in.
    """

    text: str
    domain: str
    above: float
    low: float | None
    high: float | None
    dense: float
    tokens: int
    blocks: int


@dataclass(frozen=True)
class MeasuredCut:
    """One cut that was measured.

    Attributes:
        model: Name of the model.
        weights: How the weights were stored, such as ``Q4_1``; empty for the model's own floats.
        model_type: transformers model type.
        parameters: Parameters of the dense model.
        calibration, calibration_tokens: The text that the channels were chosen on, and its tokens.
        method, allocation, recovery: As `surgery prune` takes them.
        recovery_text, recovery_tokens: The text of the recovery, and its tokens; empty and 0 without a refit.
        channels_removed, parameters_removed: Shares that the cut removed: of the FFN channels, of all parameters.
        losses: The loss on each text.
        seq_len: Tokens in a block.
        seed: Seed of the bootstrap.
        date: Day of the measurement.
        version: Version of chanfmt.
        command: The command line, with names in place of paths.
    """

    model: str
    weights: str
    model_type: str
    parameters: int
    calibration: str
    calibration_tokens: int
    method: str
    allocation: str
    recovery: str
    recovery_text: str
    recovery_tokens: int
    channels_removed: float
    parameters_removed: float
    losses: tuple[Loss, ...]
    seq_len: int
    seed: int
    date: str
    version: str
    command: str


@functools.cache
def measured_cuts() -> tuple[MeasuredCut, ...]:
    """The cuts in the package's ``measured.json``, in its order."""
    text = importlib.resources.files("surgery.planning").joinpath(FILE).read_text(encoding="utf-8")
    return cuts_of(json.loads(text))


def cuts_of(content: Mapping[str, Any]) -> tuple[MeasuredCut, ...]:
    """The cuts in the content of a ``measured.json``. Raises `ValueError` for another format."""
    if content["format"] != FORMAT:
        raise ValueError(f"{content['format']!r} is not {FORMAT!r}")
    return tuple(_cut(run, cut) for run in content["runs"] for cut in run["cuts"])


def _cut(run: Mapping[str, Any], cut: Mapping[str, Any]) -> MeasuredCut:
    shared = ("model", "weights", "model_type", "parameters", "calibration", "calibration_tokens", "seq_len", "seed", "command")
    own = ("method", "allocation", "recovery", "recovery_tokens", "channels_removed", "parameters_removed", "date", "version")
    losses = tuple(
        Loss(text["name"], text["domain"], above, low, high, text["dense"], text["tokens"], text["blocks"])
        for text, (above, low, high) in zip(run["texts"], cut["above"], strict=True)
    )
    return MeasuredCut(
        losses=losses,
        recovery_text=run["calibration"] if cut["recovery_tokens"] else "",
        **{name: run[name] for name in shared},
        **{name: cut[name] for name in own},
    )
