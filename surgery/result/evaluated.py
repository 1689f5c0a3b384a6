"""The numbers of `surgery eval` for a result and for the model it was cut from. They travel with the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from chanfmt.base.errors import UsageError
from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import check_type, parse_json
from chanfmt.data.text import FILES

EVALUATION_FORMAT = "surgery-evaluation/1"

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Measured:
    """One model's numbers, named as ``surgery eval --json`` names them; None if they are not finite or not known.

    ``perplexity_with_bos`` is known if the tokenizer puts BOS before a text: every block then begins with it.
    """

    fingerprint: str
    tokens: int
    predicted: int
    blocks: int
    tokens_sha256: str
    nll: float | None
    nll_standard_error: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tasks: tuple[dict[str, Any], ...]
    perplexity_with_bos: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """A result and the model it was cut from, measured on the same text.

    Attributes:
        data: The text's name; a file is named without its directory.
        seq_len: Tokens in a block.
        protocol, statement: How text became blocks: the protocol's name and its description.
        result: The result's numbers.
        dense: The numbers of the model it was cut from; None if that model was not measured, or read other tokens.
    """

    data: str
    seq_len: int
    protocol: str
    statement: str
    result: Measured
    dense: Measured | None

    def to_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``, which `load_evaluated` reads."""
        return {"format": EVALUATION_FORMAT, **asdict(self)}


class _Task(msgspec.Struct):
    """The parts of a task's result that a card shows."""

    task: str
    metric: str
    filter: str
    value: float | None


class _Named(msgspec.Struct):
    """One of ``models`` in the output of ``surgery eval --json``, before it is known which of them matter."""

    fingerprint: str


class _Protocol(msgspec.Struct):
    name: str
    statement: str


class _Output(msgspec.Struct):
    """The output of ``surgery eval --json``."""

    data: str
    seq_len: int
    protocol: _Protocol
    models: list[msgspec.Raw]


class _Stored(msgspec.Struct):
    """What `Evaluated.to_json` gives."""

    format: str
    data: str
    seq_len: int
    protocol: str
    statement: str
    result: Measured
    dense: Measured | None


def take_evaluation(path: Path, result: str, dense: str) -> Evaluated:
    """Take the numbers of two checkpoints, named by their fingerprints, from the output of ``surgery eval --json``.

    Raises:
        UsageError: ``path`` is not such an output, or holds no numbers of ``result``.
    """
    text = _read(path)
    try:
        output = parse_json(text, _Output)
        models = {parse_json(item, _Named).fingerprint: item for item in output.models}
        if result not in models:
            raise UsageError(f"{path} holds no evaluation of this result", hint="make one with: surgery eval MODEL DIR --json")
        # If one model was named twice, its numbers are the same.
        own, other = (_measured(parse_json(models[name], Measured)) if name in models else None for name in (result, dense))
    except ValueError as error:
        raise UsageError(f"{path} is not an output of surgery eval --json: {error}") from None
    assert own is not None
    return Evaluated(
        _source(output.data),
        output.seq_len,
        output.protocol.name,
        output.protocol.statement,
        own,
        other if other is not None and other.tokens_sha256 == own.tokens_sha256 else None,
    )


def load_evaluated(path: Path) -> Evaluated:
    """Read a file that `Evaluated.to_json` gave. Raises `UsageError` if it is not one."""
    text = _read(path)
    try:
        stored = parse_json(text, _Stored)
        if stored.format != EVALUATION_FORMAT:
            raise ValueError(f"its format is not {EVALUATION_FORMAT}")
        _measured(stored.result)
        if stored.dense is not None:
            _measured(stored.dense)
    except ValueError as error:
        raise UsageError(f"{path} is not an evaluation that surgery push wrote: {error}") from None
    return Evaluated(stored.data, stored.seq_len, stored.protocol, stored.statement, stored.result, stored.dense)


def _measured(numbers: Measured) -> Measured:
    """``numbers``, if a card can show their tasks. Raises `ValueError`."""
    for task in numbers.tasks:
        check_type(task, _Task)
    return numbers


def _read(path: Path) -> bytes:
    try:
        if file_size(path) > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _source(data: str) -> str:
    return Path(data).name if data.endswith(FILES) else data
