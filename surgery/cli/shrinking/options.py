"""Options of `surgery shrink`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from surgery.cli.options import CutOptions as CutArguments
from surgery.cut.options import DTYPES, CutOptions
from surgery.planning.formats import GGUF, SAFETENSORS
from surgery.planning.grids import parse_names
from surgery.planning.layouts import AUTO, LAYOUTS, needs_code
from surgery.planning.methods import METHODS, find_method
from surgery.planning.options import ALLOCATIONS, PlanOptions
from surgery.planning.target import SYNTAX, parse_target
from surgery.recovery.options import BEST_RECOVERY, RECOVERIES

_CUT = {item.name: item.metadata for item in fields(CutArguments)}
_PLAN = {item.name: item.metadata for item in fields(PlanOptions)}
NONE = "none"
"""Value of ``--other`` for no second text."""


@dataclass(frozen=True)
class ShrinkOptions:
    """What becomes smaller, how small, and where it goes."""

    model: str = field(metadata={"help": "Hub id, directory or .gguf file of a language model", "positional": "MODEL"})
    to: str = field(metadata={"help": f"size of the result: {SYNTAX.replace('%', '%%')}", "metavar": "SIZE"})
    output: str = field(
        metadata={
            "help": "directory to write; the steps' results go to DIR.work",
            "flag": "--output",
            "short": "-o",
            "metavar": "DIR",
        }
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"dtype of the weights of a checkpoint: {', '.join(DTYPES)} (default: bfloat16 for a .gguf file, otherwise as "
            "stored)",
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "begin again, and replace what another command left in DIR and DIR.work"}
    )
    format: str | None = field(
        default=None,
        metadata={
            "help": "safetensors for a checkpoint, or gguf for one file of llama.cpp (default: gguf for a .gguf file, unless another "
            "option needs a checkpoint)",
            "metavar": "FORMAT",
        },
    )
    quant: str | None = field(default=None, metadata=_CUT["quant"])
    cut_quant: str | None = field(default=None, metadata=_CUT["cut_quant"])
    layout: str = field(default=AUTO, metadata=_PLAN["layout"])

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        parse_target(self.to)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return self.model.endswith(".gguf")


@dataclass(frozen=True)
class MeasureOptions:
    """What the model is measured on."""

    calib: str | None = field(
        default=None,
        metadata={
            "help": "calibration text, as atlas build takes it: wikitext2, pydoc, a file, a data set (default: wikitext2)",
            "metavar": "SOURCE",
        },
    )
    atlas: str | None = field(
        default=None,
        metadata={"help": "atlas to use in place of building one: a file, or hf://REPO/FILE", "metavar": "ATLAS"},
    )
    sequences: int = field(default=64, metadata={"help": "calibration sequences"})
    seq_len: int = field(default=512, metadata={"help": "tokens of a sequence, and of a block of evaluation"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        if self.atlas is not None and self.calib is not None:
            raise UsageError(
                "--atlas says what the model was measured on, so --calib has no effect", hint="leave out one of them"
            )
        for name, low in (("sequences", 1), ("seq_len", 2)):
            if getattr(self, name) < low:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")


@dataclass(frozen=True)
class CutsOptions:
    """Which cuts are tried, and how the best one is recovered."""

    methods: str = field(
        default="scar-lp,activation", metadata={"help": "methods to try, separated by commas", "metavar": "METHODS"}
    )
    allocations: str = field(default="uniform", metadata={"help": "allocations to try, separated by commas", "metavar": "NAMES"})
    try_recover: str = field(default="lstsq", metadata={"help": "recovery of the cuts that are tried", "metavar": "HOW"})
    try_tokens: int = field(default=4096, metadata={"help": "held-out tokens that the tried cuts are measured on"})
    recover: str = field(
        default=BEST_RECOVERY, metadata={"help": f"recovery of the best cut: {', '.join(RECOVERIES)}", "metavar": "HOW"}
    )

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        if not parse_names(self.methods) or not parse_names(self.allocations):
            raise UsageError("--methods and --allocations name at least one each", hint=f"methods: {', '.join(METHODS)}")
        for method in parse_names(self.methods):
            find_method(method)
        for allocation in parse_names(self.allocations):
            if allocation not in ALLOCATIONS:
                raise unknown("allocation", allocation, ALLOCATIONS)
        for recovery in (self.try_recover, self.recover):
            if recovery not in RECOVERIES:
                raise unknown("recovery", recovery, RECOVERIES)
        if self.try_tokens < 2:
            raise UsageError(f"--try-tokens must be at least 2, not {self.try_tokens}")


@dataclass(frozen=True)
class JudgeOptions:
    """What the result is judged on."""

    held_out: str | None = field(
        default=None,
        metadata={
            "help": "text of the calibration's kind that was not measured (default: the part of --calib that is kept for "
            "evaluation, or the last tenth of a file)",
            "metavar": "SOURCE",
        },
    )
    other: str | None = field(
        default=None,
        metadata={
            "help": "text of another kind, or none (default: pydoc, or wikitext2 if pydoc is the calibration text)",
            "metavar": "SOURCE",
        },
    )
    eval_tokens: int = field(default=16384, metadata={"help": "tokens of each text to measure at most"})

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        if self.eval_tokens < 2:
            raise UsageError(f"--eval-tokens must be at least 2, not {self.eval_tokens}")


@dataclass(frozen=True)
class DryRunOptions:
    """Whether to stop before the first step."""

    dry_run: bool = field(default=False, metadata={"help": "print the estimate and the commands, and stop"})


@dataclass(frozen=True)
class Publication:
    """How the result is published.

    Attributes:
        repo: ``USER/NAME``, or ``NAME`` in the logged-in user's namespace; empty for the default name.
        public: Whether everyone can see the repository.
        create_pr: Whether to open a pull request in an existing repository instead of committing to it.
    """

    repo: str = ""
    public: bool = False
    create_pr: bool = False


@dataclass(frozen=True)
class Request:
    """Everything that a run of `surgery shrink` is asked for. Nothing is published if ``publication`` is None."""

    shrink: ShrinkOptions
    measure: MeasureOptions
    cuts: CutsOptions
    judge: JudgeOptions
    publication: Publication | None = None

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        for options in (self.shrink, self.measure, self.cuts, self.judge):
            options.check()
        shrink = self.shrink
        CutOptions(
            dtype=shrink.dtype, layout=shrink.layout, format=self.format, quant=shrink.quant, cut_quant=shrink.cut_quant
        ).check()
        if self.format == GGUF and not shrink.is_gguf:
            raise UsageError(
                f"surgery shrink makes a GGUF file of a GGUF file only, and {shrink.model} is not one",
                hint="leave out --format gguf, or use atlas build and surgery prune --format gguf; for any model, convert the result "
                "with llama.cpp: python convert_hf_to_gguf.py DIR --outfile X.gguf",
            )

    @property
    def format(self) -> str:
        """Format of the result. Who has a GGUF file runs GGUF files, so its cut is one, unless an option needs a checkpoint."""
        shrink = self.shrink
        if shrink.format is not None:
            return shrink.format
        checkpoint = shrink.dtype is not None or needs_code(shrink.layout) or "uniform" not in parse_names(self.cuts.allocations)
        return GGUF if shrink.is_gguf and not checkpoint else SAFETENSORS

    @property
    def dtype(self) -> str | None:
        """Dtype of the result; None for that of the model. A quantised file is read as float32, which nobody asked for."""
        return self.shrink.dtype or ("bfloat16" if self.shrink.is_gguf and self.format != GGUF else None)
