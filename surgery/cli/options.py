"""Groups of options that several `surgery` commands share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from chanfmt.base.errors import UsageError


@dataclass(frozen=True)
class AtlasOptions:
    """Where the scores come from."""

    atlas: str = field(
        metadata={"help": "importance atlas of the model: a file, or hf://REPO/FILE", "positional": "ATLAS", "kind": "atlas"}
    )


@dataclass(frozen=True)
class CutOptions:
    """Which model is cut, and where the result goes."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory or .gguf file of the model (default: the model that was measured, from the Hub)",
            "metavar": "MODEL",
            "kind": "model",
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "branch, tag or commit of the model on the Hub (default: the commit that was measured)",
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "directory to write (default: MODEL-METHOD-PERCENT in the working directory)",
            "flag": "--output",
            "short": "-o",
            "metavar": "DIR",
        },
    )
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: one output file for each file of the model)",
            "metavar": "SIZE",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "round the result's floating tensors: float32, bfloat16, float16 (default: as stored)",
        },
    )
    extra_layers: str | None = field(
        default=None,
        metadata={
            "help": "layers of the cut width that transformers does not load (multi-token prediction): cut, drop (default: refuse)",
            "metavar": "WHAT",
        },
    )
    no_verify: bool = field(
        default=False,
        metadata={
            "help": "do not compare logits with those of the masked dense model",
        },
    )
    allow_padding: bool = field(
        default=False,
        metadata={
            "help": "cut even if the file shrinks by less than half of what was asked, because zeros take the place of channels",
        },
    )
    format: str = field(
        default="safetensors",
        metadata={
            "help": "safetensors, or gguf: one file for llama.cpp, from a .gguf file or a checkpoint of a Llama, Mistral, Qwen2, Qwen3 or Gemma 3",
            "metavar": "FORMAT",
        },
    )
    quant: str | None = field(
        default=None,
        metadata={
            "help": "type of all matrices of a GGUF result: q8_0, q5_1, q5_0, q4_1, q4_0, bf16, f16, f32 "
            "(default: each keeps its own)",
            "metavar": "TYPE",
        },
    )
    cut_quant: str | None = field(
        default=None,
        metadata={
            "help": "type of the matrices of a GGUF result that are quantised again, because the cut or a recovery changes them "
            "(default: that of --quant, or their own, and q5_0 in place of four bits)",
            "metavar": "TYPE",
        },
    )
    imatrix: str | None = field(
        default=None,
        metadata={
            "help": "importance matrix of the dense model, from llama-imatrix or atlas export; the result gets one of the kept "
            "channels, for llama-quantize",
            "metavar": "FILE",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it is an earlier result"})


@dataclass(frozen=True)
class ResultsOptions:
    """Where an experiment's rows go."""

    output: str = field(
        metadata={
            "help": "directory for results.csv and results.json; rows that are already there are not measured again",
            "flag": "--output",
            "short": "-o",
            "metavar": "DIR",
        }
    )
    overwrite: bool = field(default=False, metadata={"help": "drop the rows that are already there"})


@dataclass(frozen=True)
class StoreOptions:
    """Which atlas gets the measured numbers."""

    store: str | None = field(
        default=None,
        metadata={
            "help": "atlas to write with the measured numbers as columns: a new file, or ATLAS itself, "
            "which then gains the columns",
            "metavar": "FILE",
        },
    )
    replace: bool = field(default=False, metadata={"help": "replace numbers that ATLAS has already"})


def parse_size(text: str | None) -> int | None:
    """Size in bytes, from text such as ``5GB`` (decimal), ``500MB`` or ``1GiB``, as transformers takes it. Raises `UsageError`."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--shard-size {text!r} is not a size", hint="write it like 5GB, 500MB or 1GiB")
    return size
