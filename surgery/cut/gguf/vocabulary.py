"""A tokenizer as GGUF metadata: byte-level BPE whose way of splitting text llama.cpp has a name for, or SentencePiece's BPE.

llama.cpp splits text by code of its own, which it finds by a name (``tokenizer.ggml.pre``). A file with the wrong name gives
other tokens without an error, so a tokenizer is written only if its ``tokenizer.json`` says that it splits as one of `SPLITS`.
SentencePiece's BPE does not split text. It merges the pair whose joined piece has the highest score, so the order of the merges
in ``tokenizer.json`` gives the scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.data.special_tokens import added_by
from chanfmt.models.gguf_header import BOOL, FLOAT32, INT32, Value
from chanfmt.models.source import TOKENIZER_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.models.source import ModelSource

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in llama.cpp."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How a tokenizer splits text before it merges.

    Attributes:
        pattern: The regular expression that splits the text, before the bytes are mapped to letters; None for GPT-2's own.
        digits: Whether every digit stands alone.
        ignore_merges: Whether a piece that is in the vocabulary is one token, whatever the merges say.
        normal_form: The Unicode normal form of the text; empty for none.
    """

    pattern: str | None
    digits: bool = False
    ignore_merges: bool = False
    normal_form: str = ""


SPLITS = {
    "gpt-2": Split(None),
    "smollm": Split(None, digits=True),
    "llama-bpe": Split(_LETTERS + r"\p{N}{1,3}" + _REST, ignore_merges=True),
    "qwen2": Split(_LETTERS + r"\p{N}" + _REST, normal_form="NFC"),
}
"""llama.cpp's name for a way to split text."""


def vocabulary(source: ModelSource, size: int) -> dict[str, Value]:
    """The tokenizer of ``source`` as metadata, for embeddings of ``size`` tokens.

    Raises:
        ModelError: The tokenizer is of another kind, or llama.cpp has no name for it.
    """
    try:
        stored = json.loads((source.directory / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"it has no {TOKENIZER_FILE}") from None
    except (OSError, ValueError):
        raise ModelError(f"its {TOKENIZER_FILE} cannot be read") from None
    try:
        tokens, types = _tokens(stored, size)
        pieces = bool(stored["model"].get("byte_fallback"))
        own = _of_pieces(stored, tokens) if pieces else _of_bytes(stored)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"its {TOKENIZER_FILE} is neither byte-level BPE nor SentencePiece's BPE") from None
    tokenizer = source.tokenizer
    around = added_by(tokenizer, source.id)
    ids = {
        name: getattr(tokenizer, f"{attribute}_token_id", None)
        for name, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
    }
    for before_or_after, name in ((around.before, "bos"), (around.after, "eos")):
        if tuple(before_or_after) not in ((), (ids[name],)):
            raise ModelError(f"its tokenizer puts other tokens than {name.upper()} around a text")
    return {
        "tokenizer.ggml.tokens": Value.texts(tokens),
        "tokenizer.ggml.token_type": Value.array(types, INT32),
        **own,
        **{f"tokenizer.ggml.{name}_token_id": Value.of(number) for name, number in ids.items() if number is not None},
        "tokenizer.ggml.add_bos_token": Value.of(bool(around.before), BOOL),
        "tokenizer.ggml.add_eos_token": Value.of(bool(around.after), BOOL),
        **_template(tokenizer),
    }


def _of_bytes(stored: Mapping[str, Any]) -> dict[str, Value]:
    """What only byte-level BPE has. Raises `ModelError` if it is something else, or splits text in an unknown way."""
    return {
        "tokenizer.ggml.model": Value.of("gpt2"),
        "tokenizer.ggml.pre": Value.of(_split_of(stored)),
        "tokenizer.ggml.merges": Value.texts([" ".join(_merge(item)) for item in stored["model"]["merges"]]),
    }


def _of_pieces(stored: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """What only SentencePiece's BPE has. Raises `ModelError` if text is prepared in an unknown way."""
    if stored["model"]["type"] != "BPE" or stored["model"].get("dropout") or stored["model"].get("ignore_merges"):
        raise ModelError("its tokenizer is not SentencePiece's BPE")
    merges = stored["model"]["merges"]
    ranks: dict[str, int] = {}
    for rank, item in enumerate(merges):
        ranks.setdefault("".join(_merge(item)), rank)
    return {
        "tokenizer.ggml.model": Value.of("llama"),
        "tokenizer.ggml.pre": Value.of("default"),
        # A piece that no merge makes, such as a letter, needs no rank.
        "tokenizer.ggml.scores": Value.array([-float(ranks.get(token, len(merges))) for token in tokens], FLOAT32),
        "tokenizer.ggml.add_space_prefix": Value.of(_adds_space(stored), BOOL),
    }


def _adds_space(stored: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of pieces puts a space before a text. Raises `ModelError` if it prepares text in an unknown way."""
    step, splitting = stored.get("normalizer"), stored.get("pre_tokenizer")
    steps = [] if step is None else step["normalizers"] if step["type"] == "Sequence" else [step]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    # Every space is a letter already, so a split at spaces splits nothing.
    whole = splitting is None or (splitting["type"] == "Split" and splitting["pattern"] == {"String": " "})
    if whole and steps in ([replaced], [{"type": "Prepend", "prepend": _SPACE}, replaced]):
        return len(steps) > 1
    raise ModelError("its tokenizer prepares text in a way that is not known to be SentencePiece's")


def _template(tokenizer: Any) -> dict[str, Value]:
    template = getattr(tokenizer, "chat_template", None)
    return {"tokenizer.chat_template": Value.of(template)} if isinstance(template, str) and template else {}


def _split_of(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits text. Raises `ModelError` if there is none."""
    model = stored["model"]
    plain = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model["type"] != "BPE" or not plain:
        raise ModelError("its tokenizer is not byte-level BPE")
    found = Split(
        *_pattern(stored["pre_tokenizer"]),
        ignore_merges=bool(model.get("ignore_merges")),
        normal_form=_normal_form(stored.get("normalizer")),
    )
    name = next((name for name, known in SPLITS.items() if known == found), None)
    if name is None:
        raise ModelError("its tokenizer splits text in a way that is not known to be one of llama.cpp's")
    return name


def _pattern(step: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The regular expression of the steps before the merges (None for GPT-2's), and whether every digit stands alone."""
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *first, last = steps
    pattern, digits = None, False
    own = last["type"] == "ByteLevel" and last.get("use_regex", True)
    for item in first:
        if item["type"] == "Digits" and item["individual_digits"] and own:
            digits = True
        elif item["type"] == "Split" and item["behavior"] == "Isolated" and not item["invert"] and not own and pattern is None:
            pattern = str(item["pattern"]["Regex"])
        else:
            raise ModelError(f"its tokenizer splits text by a step that llama.cpp does not have ({one_line(item['type'])})")
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or not (own or pattern):
        raise ModelError("its tokenizer is not byte-level BPE, or puts a space before a text")
    return pattern, digits


def _normal_form(step: Mapping[str, Any] | None) -> str:
    steps = [] if step is None else step["normalizers"] if step["type"] == "Sequence" else [step]
    return "+".join(str(item["type"]) for item in steps)


def _merge(item: Any) -> tuple[str, str]:
    parts = item.split(" ") if isinstance(item, str) else list(item)
    if len(parts) != 2 or any(" " in part for part in parts):
        raise ModelError("its tokenizer has a merge of something else than two pieces")
    return parts[0], parts[1]


def _tokens(stored: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each of ``size`` tokens."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [_UNUSED] * size
    pieces, unknown = stored["model"].get("byte_fallback"), stored["model"].get("unk_token")

    def kind_of(text: str) -> int:
        if pieces and _BYTE_PIECE.fullmatch(text):
            return _BYTE
        return _UNKNOWN if pieces and text == unknown else _NORMAL

    items = [(number, text, kind_of(text)) for text, number in stored["model"]["vocab"].items()]
    items += [
        (item["id"], item["content"], _CONTROL if item["special"] else _USER_DEFINED) for item in stored.get("added_tokens", ())
    ]
    for number, text, kind in items:
        if not 0 <= number < size:
            raise ModelError(f"its tokenizer has the token {number}, and the model has embeddings for {size} tokens")
        # llama.cpp looks for such a token in the text before spaces are replaced.
        tokens[number] = text.replace(_SPACE, " ") if pieces and kind == _USER_DEFINED else str(text)
        types[number] = kind
    return tokens, types
