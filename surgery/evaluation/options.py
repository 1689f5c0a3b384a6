"""Options of `surgery eval`, and the group that all measurements of a text share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from chanfmt.models.load import DTYPES, check_device_map
from surgery.evaluation.protocol import PROTOCOLS


@dataclass(frozen=True)
class TextOptions:
    """Which text is measured, and how the model runs on it."""

    data: str = field(
        default="wikitext2",
        metadata={
            "help": "text to measure: wikitext2, c4, pydoc (the part not used for calibration), a .txt, .jsonl or .parquet file, or "
            "any data set as NAME[:CONFIG][@SPLIT]",
            "metavar": "SOURCE",
        },
    )
    seq_len: int = field(default=2048, metadata={"help": "tokens in a block"})
    max_tokens: int = field(default=0, metadata={"help": "stop after this many tokens; 0 means all"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    device_map: str | None = field(
        default=None, metadata={"help": "spread the model over all GPUs of the machine", "choices": ("auto",)}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16 or float64"})

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible, and `MissingPackageError` for a device map without accelerate."""
        check_device_map(self.device_map, self.device)
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, not {self.seq_len}")
        if self.max_tokens < 0:
            raise UsageError(f"--max-tokens must be 0 or more, not {self.max_tokens}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    def running(self) -> dict[str, Any]:
        """All fields of the group but ``data``, as keyword arguments."""
        return {
            "seq_len": self.seq_len,
            "max_tokens": self.max_tokens,
            "device": self.device,
            "device_map": self.device_map,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class EvaluateOptions(TextOptions):
    """Which models are evaluated, and on which text."""

    models: tuple[str, ...] = field(
        kw_only=True,
        metadata={
            "help": "Hub ids, directories or .gguf files; each model is compared with the first one",
            "positional": "MODEL",
            "nargs": "+",
        },
    )
    protocol: str = field(
        default="paper",
        metadata={
            "help": "paper: the text is the non-empty rows with the tokenizer's special tokens, and the partial last block counts; "
            "common: the text is all rows without special tokens (no BOS), and only whole blocks count; in both, a blank line "
            "joins rows, blocks do not overlap, and the first token of a block is not predicted",
            "choices": tuple(PROTOCOLS),
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "also run these tasks of lm-eval, such as arc_easy,piqa (pip install 'chanfmt[eval]')",
            "metavar": "A,B,C",
        },
    )
    tasks_from: str | None = field(
        default=None, metadata={"help": "directory with task files of your own for --tasks", "metavar": "DIR"}
    )
    task_limit: int = field(default=0, metadata={"help": "items to evaluate of each task; 0 means all"})
    prompt: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "also print the greedy answers of the models to this prompt, in the chat template of a model that has one; "
            "repeat for more prompts",
            "metavar": "TEXT",
            "repeat": True,
        },
    )
    answer_tokens: int = field(default=64, metadata={"help": "tokens of an answer at most"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the models on the Hub"})

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        super().check()
        for name, value in (("seed", self.seed), ("task-limit", self.task_limit)):
            if value < 0:
                raise UsageError(f"--{name} must be 0 or more, not {value}")
        if self.answer_tokens < 1:
            raise UsageError(f"--answer-tokens must be at least 1, not {self.answer_tokens}")
        if not all(isinstance(text, str) and text.strip() for text in self.prompt):
            raise UsageError("--prompt is empty", hint="write the prompt in quotes: --prompt 'Name three colours.'")
        if self.protocol not in PROTOCOLS:
            raise unknown("protocol", self.protocol, PROTOCOLS)
        if self.tasks is not None and not self.task_names:
            raise UsageError("--tasks names no task", hint="write the names as arc_easy,piqa")
        if self.tasks is None and (self.tasks_from is not None or self.task_limit):
            raise UsageError("--tasks-from and --task-limit have no effect without --tasks", hint="add --tasks NAMES")
        if self.tasks_from is not None and not os.path.isdir(self.tasks_from):
            raise UsageError(f"--tasks-from {self.tasks_from} is not a directory")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names in ``tasks``."""
        return tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip())

    def settings(self) -> dict[str, Any]:
        """All fields but ``models`` and ``data``, as keyword arguments of `surgery.evaluation.evaluate.evaluate`."""
        names = ("protocol", "seed", "tasks", "tasks_from", "task_limit", "prompt", "answer_tokens", "revision")
        return self.running() | {name: getattr(self, name) for name in names}
