"""Perplexity by the paper's protocol, several models side by side.

The text's non-empty rows are joined by a blank line and tokenised once; blocks do not overlap, the
last partial one counts, and the first token of a block is context only (paper, section 4).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chanfmt.console import progress_bar
from chanfmt.errors import ChanfmtError, ModelError, UsageError


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and on what."""

    models: tuple[str, ...] = field(
        metadata={"help": "Hub ids, directories or .gguf files", "positional": "MODEL", "nargs": "+"}
    )
    data: str = field(default="wikitext2", metadata={
        "help": "text: wikitext2, pydoc (its held-out part), a .txt, .jsonl or .parquet file, or any data set",
        "metavar": "SOURCE",
    })
    seq_len: int = field(default=2048, metadata={"help": "tokens in a block"})
    max_tokens: int = field(default=0, metadata={"help": "stop after this many tokens, 0 for all"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16 or float64"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, not {self.seq_len}")
        if self.max_tokens < 0:
            raise UsageError(f"--max-tokens must be 0 or more, not {self.max_tokens}")


@dataclass(frozen=True)
class Evaluation:
    """One model's result.

    Attributes:
        model: As given.
        parameters: Number of parameters, tied ones once.
        tokens, predicted: Tokens read, and those of them that were predicted.
        blocks: Blocks evaluated, the partial one included.
        nll: Mean next-token NLL over the predicted tokens, nats.
        perplexity: exp(nll).
        seconds: Time in forward passes.
        cut: What ``surgery.json`` beside the model says of its channels; None for another model.
        tokens_sha256: Digest of the token ids; perplexities with different ones do not compare.
    """

    model: str
    parameters: int
    tokens: int
    predicted: int
    blocks: int
    nll: float
    perplexity: float
    seconds: float
    cut: dict[str, Any] | None
    tokens_sha256: str


def evaluate(options: EvaluateOptions, *, progress: bool = True) -> list[Evaluation]:
    """Perplexity of every model of ``options`` on the same text.

    Raises:
        ChanfmtError: A model or the text cannot be had, or a model's context is too short.
    """
    from chanfmt.produce.text import read_text

    options.check()
    from chanfmt.models.resolve import resolve_model

    resolved = [resolve_model(model, revision=options.revision) for model in options.models]
    text = read_text(options.data, "evaluate", quiet=not progress)
    return [_evaluate_one(name, model, text, options, progress)
            for name, model in zip(options.models, resolved, strict=True)]


def _evaluate_one(name: str, resolved: Any, text: Any, options: EvaluateOptions, progress: bool) -> Evaluation:
    import hashlib

    import torch

    from chanfmt.models.load import check_causal, load_config, load_model, load_tokenizer
    from chanfmt.produce.loss import NextTokenLoss
    from chanfmt.produce.tokens import check_context, check_vocabulary, tokenize

    config, tokenizer = load_config(resolved), load_tokenizer(resolved)
    check_context(config, options.seq_len, name)
    token_ids = tokenize(tokenizer, text)
    check_vocabulary(config, tokenizer, token_ids, name)
    if options.max_tokens:
        token_ids = token_ids[: options.max_tokens]
    if len(token_ids) < 2:
        raise UsageError(f"{options.data} has fewer than two tokens")
    model = load_model(resolved, dtype=options.dtype, device=options.device)
    check_causal(model)
    ids = torch.from_numpy(token_ids).long().to(next(model.parameters()).device)
    loss = NextTokenLoss(model, ids[None, :16])
    total, predicted, blocks = 0.0, 0, 0
    started = time.monotonic()
    with progress_bar(len(ids), "tok", Path(name).name, quiet=not progress) as bar:
        for block in ids.split(options.seq_len):
            # A last block of one token predicts nothing.
            if len(block) > 1:
                try:
                    total += loss.value(block[None])
                except torch.OutOfMemoryError:
                    raise ChanfmtError(
                        f"out of memory with a block of {len(block)} tokens", hint="use --dtype bfloat16, or a smaller --seq-len"
                    ) from None
                predicted += len(block) - 1
                blocks += 1
            bar.update(len(block))
    nll = total / predicted
    if not math.isfinite(nll):
        raise ModelError(f"the loss of {name} is not finite; an activation overflowed", hint="use --dtype float32")
    return Evaluation(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=len(ids),
        predicted=predicted,
        blocks=blocks,
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        seconds=time.monotonic() - started,
        cut=_cut(resolved.directory),
        tokens_sha256=hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest(),
    )


def _cut(directory: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((directory / "surgery.json").read_text(encoding="utf-8"))
        layers = report["layers"]
        return {"method": report["method"], "protect": report["protect"],
                "supernodes": sum(layer["supernodes"] for layer in layers),
                "supernodes_removed": sum(layer["supernodes_removed"] for layer in layers)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def report_data(options: EvaluateOptions, evaluations: list[Evaluation]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "data": options.data, "seq_len": options.seq_len,
        "protocol": "non-empty rows joined by a blank line, tokenised once, non-overlapping blocks, last partial one "
                    "included, first token of a block not predicted",
        "models": [asdict(evaluation) for evaluation in evaluations],
    }


def report_table(evaluations: list[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people."""
    headings = ["model", "parameters", "perplexity", "nats/token", "supernodes removed", "tokens", "tokens/s"]
    rows = []
    for item in evaluations:
        removed = "-"
        if item.cut and item.cut["supernodes"]:
            lost = item.cut["supernodes_removed"]
            removed = f"{lost} of {item.cut['supernodes']} ({lost / item.cut['supernodes']:.1%})"
        perplexity = f"{item.perplexity:,.2f}" if item.perplexity < 1e6 else f"{item.perplexity:.2e}"
        rows.append([item.model, f"{item.parameters / 1e6:,.1f}M", perplexity, f"{item.nll:.4f}", removed,
                     f"{item.predicted:,}", f"{item.tokens / max(item.seconds, 1e-9):,.0f}"])
    return headings, rows
