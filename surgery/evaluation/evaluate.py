"""Perplexity of several models on the same tokens, and lm-eval's tasks where they are asked for."""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import progress_bar
from surgery.evaluation.protocol import PROTOCOLS, EvaluationTokens, prepare_text
from surgery.result.names import REPORT_FILE

if TYPE_CHECKING:
    from chanfmt.data.text import Text
    from chanfmt.models.source import ModelSource
    from surgery.evaluation.perplexity import BlockLosses, Comparison
    from surgery.evaluation.tasks import TaskResult, Tasks


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and on what."""

    models: tuple[str, ...] = field(
        metadata={
            "help": "Hub ids, directories or .gguf files; the others are compared with the first",
            "positional": "MODEL",
            "nargs": "+",
        }
    )
    data: str = field(
        default="wikitext2",
        metadata={
            "help": "text: wikitext2, pydoc (its held-out part), a .txt, .jsonl or .parquet file, or any data set",
            "metavar": "SOURCE",
        },
    )
    protocol: str = field(
        default="paper",
        metadata={
            "help": "paper: non-empty rows, tokenised with the tokenizer's special tokens, the partial last block counts; "
            "common: all rows, no special tokens (no BOS), whole blocks only; in both a blank line joins rows, blocks do "
            "not overlap, and a block's first token is not predicted",
            "choices": tuple(PROTOCOLS),
        },
    )
    seq_len: int = field(default=2048, metadata={"help": "tokens in a block"})
    max_tokens: int = field(default=0, metadata={"help": "stop after this many tokens, 0 for all"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "run these tasks of lm-eval too, such as arc_easy,piqa (pip install 'chanfmt[eval]')",
            "metavar": "A,B,C",
        },
    )
    tasks_from: str | None = field(default=None, metadata={"help": "directory of further task files", "metavar": "DIR"})
    task_limit: int = field(default=0, metadata={"help": "items of each task, 0 for all"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16 or float64"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, not {self.seq_len}")
        for name, value in (("max-tokens", self.max_tokens), ("seed", self.seed), ("task-limit", self.task_limit)):
            if value < 0:
                raise UsageError(f"--{name} must be 0 or more, not {value}")
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"--protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if self.tasks is not None and not self.task_names:
            raise UsageError("--tasks names no task", hint="write them as arc_easy,piqa")
        if self.tasks is None and (self.tasks_from is not None or self.task_limit):
            raise UsageError("--tasks-from and --task-limit are for --tasks")
        if self.tasks_from is not None and not Path(self.tasks_from).is_dir():
            raise UsageError(f"--tasks-from {self.tasks_from} is not a directory")

    @property
    def task_names(self) -> tuple[str, ...]:
        """What ``tasks`` lists."""
        return tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip())


@dataclass(frozen=True)
class Evaluation:
    """One model's result.

    Attributes:
        model: As given.
        fingerprint: Of its checkpoint (`chanfmt.models.safetensors.fingerprint`).
        parameters: Number of parameters, tied ones once.
        tokens: What it was evaluated on.
        losses: Its loss in every block.
        comparison: With the first model; None for that one, and where the tokens are others.
        seconds: Time in forward passes.
        tokens_per_second: Speed after the first block, in which a device warms up; over all where there is no other.
        peak_memory_bytes: Largest memory use while the blocks ran, the weights included; None where the system keeps
            no such number.
        memory: What that is of: ``rss`` of the process, or ``cuda`` for what torch allocated on the GPU.
        cut: What ``surgery.json`` beside the model says of its channels; None for another model.
        tasks: Results of lm-eval.
    """

    model: str
    fingerprint: str
    parameters: int
    tokens: EvaluationTokens
    losses: BlockLosses
    comparison: Comparison | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    memory: str
    cut: dict[str, Any] | None
    tasks: tuple[TaskResult, ...] = ()

    @property
    def bits_per_byte(self) -> float | None:
        """Summed NLL of the predicted tokens in bits, over the bytes that they stand for; None where these are not known."""
        size = self.tokens.predicted_bytes
        return float(self.losses.nll.sum()) / (math.log(2) * size) if size else None


@dataclass(frozen=True)
class _Prepared:
    """A model before its weights are read."""

    name: str
    source: ModelSource
    tokenizer: Any
    tokens: EvaluationTokens


def evaluate(options: EvaluateOptions) -> list[Evaluation]:
    """Every model of ``options`` on the same text, one in memory at a time.

    Raises:
        ChanfmtError: A model, the text or a task cannot be had, or a model's context is too short.
    """
    options.check()
    tasks = None
    if options.task_names:
        from surgery.evaluation.tasks import Tasks

        tasks = Tasks(options.task_names, directory=options.tasks_from, limit=options.task_limit)

    from chanfmt.data.text import read_text
    from chanfmt.hub.locate import locate_model

    sources = [locate_model(model, revision=options.revision) for model in options.models]
    text = read_text(options.data, "evaluate", empty_rows=PROTOCOLS[options.protocol].empty_rows)
    # All of them before the first is run: what is wrong with the last should not take an hour to show.
    prepared = [_prepare(name, model, text, options) for name, model in zip(options.models, sources, strict=True)]
    evaluations: list[Evaluation] = []
    for model in prepared:
        evaluations.append(_evaluate_one(model, options, tasks, evaluations[0] if evaluations else None))
        # Models hold cycles; the next one's memory should not include this one's.
        gc.collect()
    return evaluations


def _prepare(name: str, source: ModelSource, text: Text, options: EvaluateOptions) -> _Prepared:
    tokenizer, tokens = prepare_text(name, source, text, PROTOCOLS[options.protocol], options.seq_len, options.max_tokens)
    return _Prepared(name, source, tokenizer, tokens)


def _evaluate_one(prepared: _Prepared, options: EvaluateOptions, tasks: Tasks | None, first: Evaluation | None) -> Evaluation:
    from chanfmt.models.causal import check_causal
    from chanfmt.models.load import load_model
    from surgery.evaluation.memory import PeakMemory
    from surgery.evaluation.perplexity import block_losses, paired_bootstrap

    tokens = prepared.tokens
    model = load_model(prepared.source, dtype=options.dtype, device=options.device)
    check_causal(model)
    memory = PeakMemory(next(model.parameters()).device)
    with progress_bar(len(tokens.ids), "tok", Path(prepared.name).name) as bar:
        times = [(0, time.monotonic())]

        def step(count: int) -> None:
            times.append((times[-1][0] + count, time.monotonic()))
            bar.update(count)

        losses = block_losses(model, tokens.ids, options.seq_len, progress=step, name=prepared.name)
    peak = memory.bytes()
    comparison = None
    if first and first.tokens.sha256 == tokens.sha256:
        comparison = paired_bootstrap(first.losses, losses, seed=options.seed)
    (skipped, since), (total, until) = times[1 if len(times) > 2 else 0], times[-1]
    return Evaluation(
        model=prepared.name,
        fingerprint=prepared.source.fingerprint,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tokens,
        losses=losses,
        comparison=comparison,
        seconds=until - times[0][1],
        tokens_per_second=(total - skipped) / max(until - since, 1e-9),
        peak_memory_bytes=peak,
        memory=memory.kind,
        cut=_cut(prepared.source.directory),
        tasks=tasks.run(model, prepared.tokenizer) if tasks else (),
    )


def _cut(directory: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
        layers = report["layers"]
        return {
            "method": report["method"],
            "protect": report["protect"],
            "supernodes": sum(layer["supernodes"] for layer in layers),
            "supernodes_removed": sum(layer["supernodes_removed"] for layer in layers),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
