"""What a run of `surgery shrink` will take, by simple arithmetic from the model's size and one probe of the machine's speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.memory import available_memory
from surgery.cli.shrinking.steps import PROMPTS
from surgery.cut.gguf.layout import bytes_of
from surgery.planning.formats import GGUF
from surgery.planning.grids import parse_names
from surgery.planning.sizes import count_text, size_text
from surgery.planning.target import BYTES, BYTES_OF, parse_target

if TYPE_CHECKING:
    from chanfmt.models.source import ModelSource
    from surgery.cli.shrinking.options import Request
    from surgery.cli.shrinking.texts import Texts
    from surgery.planning.target import Target

PASSES = {"none": 0.0, "bias": 0.0, "lstsq": 4.0, "block": 20.0, "distill": 60.0}
"""Forward passes over the calibration tokens that a recovery costs as much as."""
BUILD_PASSES = 4.0
"""The same for a build: forward, backward, and the sums."""
START_SECONDS = 8.0
"""Seconds for the start of a command and the loading of a small model."""
LOAD_BYTES = 5e8
"""Bytes of weights that are loaded, converted and checked in a second."""
DECODE_BYTES = 4e9
"""Bytes of weights that are read in a second while an answer is written."""
EFFICIENCY = 0.5
"""Share of the probe's rate that a model reaches: its matrices are smaller, and not all of its work is matrices."""
ANSWER_TOKENS = 64
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "intermediate_dim")
"""Config fields that hold the width of an FFN."""
_PROBE = 1024
"""Rows of the matrices of the probe."""
_PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        parameters: Parameters of the model.
        most: Parameters of the result at most.
        size: Bytes of the result, about.
        size_now: Bytes of the model's GGUF file; 0 if it is not one, or its cut is not.
        rate: Multiplications and additions in a second, as probed.
        seconds: Name of each step to its seconds.
        memory: Bytes of memory at the peak.
        available: Bytes of memory that are available; None if the model runs on another device than the CPU.
        disk: Bytes that the result and the steps' results take.
    """

    parameters: int
    most: int
    size: int
    size_now: int
    rate: float
    seconds: dict[str, float]
    memory: int
    available: int | None
    disk: int

    def rows(self, target: Target, dtype: str) -> list[list[str]]:
        """Names and values for people."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.seconds.items())
        room = "" if self.available is None else f"; {self.available / 1e9:.1f} GB are available"
        return [
            [
                "size now",
                f"{count_text(self.parameters)} parameters" + (f", {size_text(self.size_now)}" if self.size_now else ""),
            ],
            [
                "size then",
                f"about {count_text(self.most)} parameters, a GGUF file of about {size_text(self.size)}"
                if self.size_now
                else f"at most {count_text(self.most)} parameters, {size_text(self.size)} in {dtype}",
            ],
            ["time", f"about {_duration(total)}: {parts}"],
            [
                "",
                f"(counted at {EFFICIENCY:.0%} of {self.rate / 1e9:,.0f} GFLOP/s, probed now; expect up to three times as much)",
            ],
            ["memory", f"about {self.memory / 1e9:.1f} GB{room}"],
            ["disk", f"about {self.disk / 1e9:.2f} GB"],
        ]

    def to_json(self) -> dict[str, Any]:
        """The object ``estimate`` of ``--json``."""
        return {
            "parameters": {"before": self.parameters, "after_at_most": self.most},
            "bytes_after_at_most": self.size,
            "seconds": self.seconds,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "probed_flops": self.rate,
        }


def estimate(request: Request, texts: Texts, source: ModelSource, device: Any) -> Estimate:
    """Estimate a run. The machine is probed for less than a second, and no weight is read.

    Args:
        device: The torch device that the steps will run on.

    Raises:
        UsageError: No cut of FFNs reaches the size.
        ModelError: The model's files cannot be read.
    """
    target, before = parse_target(request.shrink.to), source.index.parameters
    dtype = result_dtype(request, source)
    each: float = BYTES_OF[dtype]
    size_now = 0
    if request.format == GGUF:
        assert source.file is not None
        size_now = source.file.stat().st_size
        each = size_now / before if request.shrink.quant is None else bytes_of(request.shrink.quant)
    most = min(target.parameters(before, each), before) if size_now else target.parameters(before, each)
    size = round(target.amount if size_now and target.kind == BYTES else most * each)
    # The types of a GGUF file differ, so its bytes tell the parameters only roughly. The plan counts exactly.
    if not (size_now and target.kind == BYTES):
        _check_reachable(target, source, most, each)
    elif request.shrink.quant is None and size >= size_now:
        raise UsageError(f"--to {target.text} removes nothing: the file has {size_text(size_now)}", hint="ask for less")
    config = source.config.get_text_config()
    tokens = request.measure.sequences * request.measure.seq_len
    rate = probe(device)
    forward = 2 * before / (EFFICIENCY * rate)
    load = START_SECONDS + 4 * before / LOAD_BYTES
    candidates = len(parse_names(request.cuts.methods)) * len(parse_names(request.cuts.allocations))
    tried = request.cuts.try_tokens * (candidates + 1) + candidates * PASSES.get(request.cuts.try_recover, 20.0) * tokens
    answering = 2 * len(PROMPTS) * ANSWER_TOKENS * max(4 * before / DECODE_BYTES, forward)
    measured = 2 * request.judge.eval_tokens
    seconds = {
        **({} if request.measure.atlas else {"measure": load + forward * BUILD_PASSES * tokens}),
        **({"try": load + forward * tried} if candidates > 1 else {}),
        "cut": 2 * load + forward * PASSES.get(request.cuts.recover, 60.0) * tokens,
        "evaluate": 2 * load + forward * measured + answering,
        **({"evaluate other": 2 * load + forward * measured} if texts.other else {}),
    }
    held = 4 if device.type == "cpu" else 2
    logits = 3 * 4 * request.measure.seq_len * config.vocab_size
    spool = min(4 << 30, 2 * 4 * tokens * config.hidden_size)
    return Estimate(
        before,
        most,
        size,
        size_now,
        rate,
        {name: round(value, 1) for name, value in seconds.items()},
        held * before + logits + spool + (600 << 20),
        available_memory() if device.type == "cpu" else None,
        # The atlas and its copy take some hundred bytes for each of about a million channels at most.
        # A GGUF file is made from a checkpoint in float32, and read by way of one in the cache.
        size + (100 << 20) + (2 * 4 * most if size_now else 0),
    )


def result_dtype(request: Request, source: ModelSource) -> str:
    """Dtype of the result's weights: the one that is asked for, or the one that the config names."""
    named = str(getattr(source.config.get_text_config(), "dtype", None) or source.config.dtype).removeprefix("torch.")
    return request.dtype or (named if named in BYTES_OF else "float32")


def probe(device: Any) -> float:
    """Floating-point operations in a second of products of float32 matrices on ``device``."""
    import torch

    left = torch.ones(_PROBE, _PROBE, device=device)
    right = torch.ones(_PROBE, _PROBE, device=device)
    (left @ right).sum().item()
    count, started = 0, time.monotonic()
    while time.monotonic() - started < _PROBE_SECONDS:
        (left @ right)[0, 0].item()
        count += 1
    return count * 2.0 * _PROBE**3 / (time.monotonic() - started)


def ffn_parameters(source: ModelSource) -> int | None:
    """Elements of the tensors one side of which is as long as an FFN is wide; None if the config names no such width."""
    config = source.config.get_text_config()
    widths = {value for name in _WIDTHS if isinstance(value := getattr(config, name, None), int) and value > 0}
    both = widths | {2 * width for width in widths}
    found = sum(entry.elements for entry in source.index.tensors.values() if both & set(entry.shape))
    return found or None


def _check_reachable(target: Target, source: ModelSource, most: int, each: float) -> None:
    """Refuse a size that is below everything but the FFNs: the atlas, which tells exactly, takes long to build."""
    before = source.index.parameters
    if most >= before:
        raise UsageError(
            f"--to {target.text} removes nothing: the model has {count_text(before)} parameters", hint="ask for less"
        )
    ffn = ffn_parameters(source)
    if ffn is not None and most < before - ffn:
        raise UsageError(
            f"--to {target.text} cannot be reached by removing FFN channels: everything else has {count_text(before - ffn)} of "
            f"{count_text(before)} parameters",
            hint=f"use more than --to {target.spelled(before - ffn, before, each)}",
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
