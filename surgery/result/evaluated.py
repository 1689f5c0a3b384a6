"""What `surgery eval` measured of a result and of the model it was cut from, as it travels with the result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chanfmt.base.errors import UsageError
from chanfmt.base.typed import list_of, typed
from chanfmt.data.text import FILES

EVALUATION_FORMAT = "surgery-evaluation/1"

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Measured:
    """One model's numbers, named as ``surgery eval --json`` names them; None where they are not finite or not known."""

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


@dataclass(frozen=True)
class Evaluated:
    """A result beside the model it was cut from, on the same text.

    Attributes:
        data: The text's name; a file's without its directory.
        seq_len: Tokens in a block.
        protocol, statement: How text became blocks: the protocol's name, and what it says.
        result: The result's numbers.
        dense: Those of the model it was cut from; None where it was not among the models, or read other tokens.
    """

    data: str
    seq_len: int
    protocol: str
    statement: str
    result: Measured
    dense: Measured | None

    def to_json(self) -> dict[str, Any]:
        """What `parse_evaluated` reads."""
        return {"format": EVALUATION_FORMAT, **asdict(self)}


def take_evaluation(path: Path, result: str, dense: str) -> Evaluated:
    """The numbers in the output of ``surgery eval --json`` that are of two checkpoints, told by their fingerprints.

    Raises:
        UsageError: ``path`` is no such output, or holds no numbers of ``result``.
    """
    value = _read(path)
    try:
        models = {str(item.get("fingerprint")): item for item in list_of(value["models"], dict, "models")}
        if result not in models:
            raise UsageError(f"{path} holds no evaluation of this result", hint="make one with: surgery eval MODEL DIR --json")
        # One model may be named twice; its numbers are the same then.
        own, other = _measured(models[result]), _measured(models[dense]) if dense in models else None
        same = other is not None and other.tokens_sha256 == own.tokens_sha256
        return Evaluated(
            _source(typed(value["data"], str, "data")),
            typed(value["seq_len"], int, "seq_len"),
            typed(value["protocol"]["name"], str, "protocol"),
            typed(value["protocol"]["statement"], str, "protocol"),
            own,
            other if same else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no output of surgery eval --json: {error}") from None


def load_evaluated(path: Path) -> Evaluated:
    """Read what `Evaluated.to_json` gave. Raises `UsageError`."""
    value = _read(path)
    try:
        if value["format"] != EVALUATION_FORMAT:
            raise ValueError(f"its format is not {EVALUATION_FORMAT}")
        return Evaluated(
            typed(value["data"], str, "data"),
            typed(value["seq_len"], int, "seq_len"),
            typed(value["protocol"], str, "protocol"),
            typed(value["statement"], str, "statement"),
            _measured(value["result"]),
            None if value["dense"] is None else _measured(value["dense"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no evaluation that surgery push wrote: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MB")
        return typed(json.loads(path.read_text(encoding="utf-8")), dict, "it")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON document: {error}", hint="make it with: surgery eval ... --json") from None


def _source(data: str) -> str:
    return Path(data).name if data.endswith(FILES) else data


def _measured(item: Any) -> Measured:
    counts = {name: typed(item[name], int, name) for name in ("tokens", "predicted", "blocks")}
    texts = {name: typed(item[name], str, name) for name in ("fingerprint", "tokens_sha256")}
    numbers = {
        name: typed(item[name], int | float | None, name) for name in ("nll", "nll_standard_error", "perplexity", "bits_per_byte")
    }
    return Measured(**counts, **texts, **numbers, tasks=list_of(item["tasks"], dict, "tasks"))
