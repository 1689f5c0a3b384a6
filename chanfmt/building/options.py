"""The options of `atlas build`, for the command line and for Python."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path, partial_beside
from chanfmt.base.inputs import input_path
from chanfmt.data.shares import divide, read_weights
from chanfmt.data.text import ARRAYS, BOS, SELF
from chanfmt.format import schema
from chanfmt.format.columns import DRIVERS, DRIVERS_KEPT, MOST_DRIVERS, NO_GROUPS, measured_groups
from chanfmt.models.load import DTYPES, check_device_map

AUTO, WHOLE, RECOMPUTE, STREAM = "auto", "whole", "recompute", "stream"
ORDERS = (AUTO, WHOLE, RECOMPUTE, STREAM)
"""Values of ``--memory``: the order of a pass, which decides what is in memory at a time."""
_COUNT = re.compile("0*[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class BuildOptions:
    """What to measure, on what, and where to write the atlas."""

    model: str = field(metadata={"help": "Hub id, local directory, or .gguf file", "positional": "MODEL", "kind": "model"})
    output: str = field(
        metadata={"help": "atlas file to write", "flag": "--output", "short": "-o", "metavar": "FILE", "kind": "atlas"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the model on the Hub"})
    revisions: str | None = field(
        default=None,
        metadata={
            "help": "write one atlas for each of these revisions, one after the other, into the directory that -o names. Revisions "
            "are branches, tags or commits of a model on the Hub, or directories (checkpoint-100) inside a local directory. "
            "The same command continues after an interruption; files downloaded for one revision are removed from the cache "
            "before the next",
            "metavar": "R1,R2,...",
        },
    )
    calib: str | tuple[str, ...] = field(
        default="wikitext2",
        metadata={
            "help": "calibration text: wikitext2, c4, pydoc (ships with Python), self (sampled from the model), "
            "a .txt, .jsonl or .parquet file, or any data set as NAME[:CONFIG][@SPLIT]. Repeat the option for several "
            "texts, which share the sequences equally or by their weights. For models that do not take text, pass a .npz or "
            ".safetensors file with the inputs of forward: one array per argument name, samples along the first axis",
            "metavar": "SOURCE[=WEIGHT]",
            "repeat": True,
        },
    )
    loss: str = field(
        default="auto",
        metadata={
            "help": "loss that is differentiated: next-token (causal models), masked-token (encoders with a language-model "
            "head), reconstruction (encoder-decoders), embedding (any model), labels (given with the inputs in a .npz or "
            ".safetensors file), or auto, the loss that the model was made for",
            "choices": ("auto", *schema.LOSSES),
            "noun": "loss",
        },
    )
    sequences: int = field(default=64, metadata={"help": "number of calibration sequences, or of samples from a file of inputs"})
    seq_len: int = field(default=512, metadata={"help": "number of tokens in a sequence, special tokens included"})
    bos: str = field(
        default="auto",
        metadata={
            "help": "special tokens around each sequence: auto (those that the tokenizer puts around a text, such as BOS, or CLS "
            "and SEP), always (BOS too, if the tokenizer has one and does not add it), or never",
            "choices": BOS,
            "noun": "bos",
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the random sample"})
    batch_size: str = field(default="auto", metadata={"help": "number of sequences in a batch, or auto"})
    device: str = field(default="auto", metadata={"help": "device to run on: auto, cpu, cuda, cuda:1, ..."})
    device_map: str | None = field(
        default=None, metadata={"help": "spread one model over all GPUs of the machine", "choices": ("auto",)}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the model: auto, float32, bfloat16, float16 or float64; auto is float32 on a CPU, "
            "and the checkpoint's dtype on other devices"
        },
    )
    stream: bool = field(
        default=False,
        metadata={"help": "measure a model larger than memory: one block at a time, weights read as needed (--memory stream)"},
    )
    memory: str = field(
        default=AUTO,
        metadata={
            "help": "what is in memory at a time: whole (the weights, and what all blocks keep for the backward pass: fastest), "
            "recompute (the weights, and one block's activations, which are computed again: half as much time more), "
            "stream (one block's weights and activations), or auto, the first of these that is predicted to fit",
            "choices": ORDERS,
            "noun": "memory",
        },
    )
    spool_limit: float = field(
        default=4.0,
        metadata={
            "help": "memory in GiB for the intermediate results of --memory recompute and stream; the rest goes to a file next to "
            "the output",
            "metavar": "GIB",
        },
    )
    no_store_tokens: bool = field(
        default=False, metadata={"help": "write only the hashes of the calibration tokens, not the tokens"}
    )
    columns: str = field(
        default=NO_GROUPS,
        metadata={
            "help": "further columns to measure in the same pass: peaks (super-weight candidates, and the token of the largest |u|), "
            "positions (shares of first tokens and of delimiters), activity (how often a channel is active, and how that differs "
            "between the sources), drivers (the tokens that drive each channel hardest), several of them with commas between, all, or "
            "none",
            "metavar": "NAME,...",
        },
    )
    drivers: int = field(
        default=DRIVERS_KEPT, metadata={"help": "driving tokens of each channel that --columns drivers keeps", "metavar": "N"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "allow code from the model's repository to run"})
    resume: bool = field(default=False, metadata={"help": "continue an interrupted build from FILE.partial next to the output"})
    checkpoint_every: float | None = field(
        default=None,
        metadata={
            "help": "seconds from one write of the partial atlas to the next (0: after every batch; inf: only on interrupt; "
            "default: as often as costs at most 2%% of the run time, in runs over 30 seconds)",
            "metavar": "SECONDS",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output"})
    dry_run: bool = field(default=False, metadata={"help": "find the FFNs and print what would be measured; write nothing"})

    def check(self) -> None:
        """Raise `UsageError` for a value that is not allowed, or for options that cannot be combined."""
        for name, known in (("loss", ("auto", *schema.LOSSES)), ("bos", BOS), ("memory", ORDERS)):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        for name in ("sequences", "seq_len"):
            low = 2 if name == "seq_len" else 1
            if getattr(self, name) < low:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must lie between 0 and 2^63, not {self.seed}")
        if self.checkpoint_every is not None and not self.checkpoint_every >= 0:
            raise UsageError(f"--checkpoint-every must be 0 or more seconds, not {self.checkpoint_every:g}")
        if not 1 <= self.drivers <= MOST_DRIVERS:
            raise UsageError(f"--drivers must be between 1 and {MOST_DRIVERS}, not {self.drivers}")
        if self.drivers != DRIVERS_KEPT and DRIVERS not in self.column_groups:
            raise UsageError(
                "--drivers has no effect without --columns drivers", hint=f"add --columns {DRIVERS}, or leave it out"
            )
        if not 0 <= self.spool_limit < 2**33:
            raise UsageError(f"--spool-limit must be 0 or more GiB, not {self.spool_limit:g}")
        if self.revisions is None and not self.path.name:
            raise UsageError(f"-o {self.output!r} names no file", hint="name the atlas to write, such as llama.h5")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.loss == "labels" and self.inputs is None:
            raise UsageError(
                "--loss labels is for a file of inputs that holds labels, and --calib names text",
                hint="add --calib FILE.npz, or leave out --loss",
            )
        if self.stream and self.memory not in (AUTO, STREAM):
            raise UsageError(
                f"--stream and --memory {self.memory} cannot be combined: --stream means --memory {STREAM}",
                hint="leave out one of them",
            )
        if self.order == STREAM and SELF in self.shares:
            raise UsageError(
                f"--calib {SELF} and {self.order_flag} cannot be combined: sampling runs the whole model for every token",
                hint=f"use another --calib, or measure without {self.order_flag}",
            )
        if len(self.shares) > 1 and any(PurePath(source).suffix in ARRAYS for source in self.shares):
            raise UsageError("--calib takes a file of inputs only by itself", hint="build several atlases, and merge them")
        if self.bos != "auto" and self.inputs is not None:
            raise UsageError(
                f"--bos {self.bos} has no effect on {self.inputs.name}: the sequences of a file of inputs are used as they are",
                hint="leave out --bos",
            )
        check_device_map(self.device_map, self.device)
        if self.device_map and self.order == STREAM:
            raise UsageError(
                f"--device-map keeps all weights on devices, and {self.order_flag} keeps one block's",
                hint="leave out one of them",
            )
        if self.device_map and self.order == RECOMPUTE:
            raise UsageError(
                f"{self.order_flag} runs a model that lies on one device, and --device-map spreads it over several",
                hint="leave out one of them",
            )
        if self.revisions is not None:
            for name in ("revision", "resume", "dry_run"):
                if getattr(self, name):
                    raise UsageError(
                        f"--revisions and --{name.replace('_', '-')} cannot be combined", hint="leave out one of them"
                    )
            if not self.revision_names:
                raise UsageError("--revisions names no revision", hint="for example: --revisions step1000,step2000")
        _ = self.batch, self.column_groups

    def check_in_memory(self) -> None:
        """Raise `UsageError` for an option that cannot be used with a model that is in memory."""
        for value, flag in (
            (self.order == STREAM, self.order_flag),
            (self.device_map, "--device-map"),
            (self.revision, "--revision"),
            (self.revisions, "--revisions"),
        ):
            if value:
                raise UsageError(
                    f"{flag} is for a model that is read from its files, not for one that is in memory",
                    hint="leave it out, or give the directory or the Hub id of the model",
                )

    @property
    def order(self) -> str:
        """What is asked for by ``memory``, or by ``stream``: one of `ORDERS`."""
        return STREAM if self.stream else self.memory

    @property
    def order_flag(self) -> str:
        """The option that asks for the order, as the user wrote it."""
        return "--stream" if self.stream else f"--memory {self.memory}"

    @property
    def revision_names(self) -> list[str]:
        """The revisions of ``revisions``, in the order given, without duplicates."""
        return list(dict.fromkeys(name.strip() for name in (self.revisions or "").split(",") if name.strip()))

    @property
    def column_groups(self) -> tuple[str, ...]:
        """The groups of columns to measure. Raises `UsageError`."""
        return measured_groups(self.columns)

    @property
    def shares(self) -> dict[str, int]:
        """Number of sequences of each calibration source."""
        return divide(read_weights((self.calib,) if isinstance(self.calib, str) else self.calib), self.sequences)

    @property
    def inputs(self) -> Path | None:
        """The file of inputs that takes the place of text; None if the model is calibrated on text."""
        source = next(iter(self.shares))
        return input_path(source) if PurePath(source).suffix in ARRAYS else None

    @property
    def batch(self) -> int | None:
        """Sequences in a batch; None for ``auto``. Raises `UsageError`."""
        if self.batch_size == "auto":
            return None
        if not _COUNT.fullmatch(self.batch_size):
            raise UsageError(f"--batch-size must be a positive number or auto, not {self.batch_size[:40]!r}")
        return int(self.batch_size)

    @property
    def path(self) -> Path:
        """File of the atlas."""
        return output_path(self.output)

    @property
    def partial(self) -> Path:
        """File of the partial atlas, which an unfinished build leaves."""
        return partial_beside(self.path)
