"""Small models: the device against float64 on the CPU, the same bits twice, a resumed build, recoveries, eval, sweep."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.gpu.checkpoints import EXPERTS, SMALL, make
from bench.gpu.compare import bits, differences
from bench.gpu.items import DEVICE, TINY, WORK, item, run, succeed
from chanfmt.models import next_token

if TYPE_CHECKING:
    from pathlib import Path

SEQUENCES, SEQ_LEN = (16, 32) if TINY else (32, 256)
LOOSE = {"float64": 1e-6, "float32": 1e-2}
"""Largest 99th percentile of LP's relative difference from float64 on the CPU. 16-bit dtypes are recorded, not judged."""
TEXT = ("--data", "pydoc", "--seq-len", 256 if TINY else 512, "--max-tokens", 1024 if TINY else 4096, "--device", DEVICE)


def main() -> None:
    for model, kind, sizes in (("dense", "llama", SMALL), ("experts", "qwen3_moe", SMALL | EXPERTS)):
        directory = WORK / model
        item(
            f"{model}: write the checkpoint",
            partial(make, directory, kind, sizes, device="cpu", sequences=SEQUENCES, seq_len=SEQ_LEN),
        )
        reference = WORK / f"{model}-reference.h5"
        item(f"{model}: float64 on the CPU", partial(build, directory, reference, "float64", "--device", "cpu"))
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            item(f"{model}: {dtype} against float64", partial(agreement, directory, reference, dtype))
        item(f"{model}: float32, --stream, against float64", partial(agreement, directory, reference, "float32", "--stream"))
        item(f"{model}: the same bits twice", partial(twice, directory))
    dense, atlas = WORK / "dense", WORK / "dense-bfloat16.h5"
    item("dense: the bits of a resumed build", lambda: resumed(dense))
    for method in ("none", "bias", "lstsq", "block", "distill"):
        item(f"dense: prune --recover {method}", partial(prune, atlas, dense, method))
    for method in ("none", "lstsq", "block"):
        item(f"experts: prune --recover {method}", partial(prune, WORK / "experts-bfloat16.h5", WORK / "experts", method))
    item("dense: eval", lambda: run("surgery", "eval", dense, WORK / "dense-bfloat16-lstsq", *TEXT))
    item(
        "dense: sweep",
        lambda: run("surgery", "sweep", atlas, "--model", dense, "-o", WORK / "sweep", "--methods", "scar-lp", "--sparsity", "0.5",
                    "--recover", "none,bias,lstsq", *TEXT, "--overwrite"),
    )  # fmt: skip
    item(
        "dense: ablate halo",
        lambda: run("surgery", "ablate", "halo", atlas, "--model", dense, "-o", WORK / "halo", *TEXT, "--overwrite"),
    )


def build(model: Path, output: Path, dtype: str, *more: object) -> None:
    """Build an atlas on all tokens. Raises `RuntimeError` if the command fails."""
    succeed(*command(model, output, dtype, *more))


def command(model: Path, output: Path, dtype: str, *more: object) -> list[Any]:
    return [
        "atlas", "build", model, "-o", output, "--calib", model / "tokens.npz", "--sequences", SEQUENCES, "--seq-len", SEQ_LEN,
        "--dtype", dtype, "--overwrite", "--quiet", *more,
    ]  # fmt: skip


def agreement(model: Path, reference: Path, dtype: str, *more: str) -> dict[str, Any]:
    """How far the device is from float64 on the CPU."""
    output = WORK / f"{model.name}-{dtype}.h5"
    if more:
        output = WORK / f"{model.name}-stream.h5"
    build(model, output, dtype, "--device", DEVICE, *more)
    found = differences(reference, output)
    if dtype in LOOSE and not found["lp"][1] <= LOOSE[dtype]:
        raise RuntimeError(f"LP differs by {found['lp'][1]:g}, allowed: {LOOSE[dtype]:g}")
    return found


def twice(model: Path) -> dict[str, Any]:
    """Whether a second build of the same model has the same bits."""
    build(model, WORK / "again.h5", "bfloat16", "--device", DEVICE)
    return bits(WORK / f"{model.name}-bfloat16.h5", WORK / "again.h5")


def resumed(model: Path) -> dict[str, Any]:
    """Stop a build before its fourth batch, continue it, and compare the bits with a build that was not stopped."""
    real, calls = next_token.NextTokenLoss.backward, []

    def backward(self: Any, ids: Any) -> float:
        calls.append(len(ids))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, ids)

    more = ("--device", DEVICE, "--batch-size", 2)
    next_token.NextTokenLoss.backward = backward  # type: ignore[method-assign]
    try:
        stopped = run(*command(model, WORK / "stopped.h5", "bfloat16", *more))
    finally:
        next_token.NextTokenLoss.backward = real  # type: ignore[method-assign]
    if stopped["code"] != 130:
        raise RuntimeError(f"the build was not stopped, it ended with {stopped['code']}")
    build(model, WORK / "stopped.h5", "bfloat16", *more, "--resume")
    build(model, WORK / "whole.h5", "bfloat16", *more)
    return bits(WORK / "whole.h5", WORK / "stopped.h5")


def prune(atlas: Path, model: Path, method: str) -> dict[str, Any]:
    """Cut half of every FFN. The command compares the result with the masked model, and fails if they differ."""
    output = WORK / f"{atlas.stem}-{method}"
    more: tuple[object, ...] = () if method in ("none", "bias") else ("--recover-device", DEVICE)
    if method == "distill":
        more += ("--recover-steps", 3)
    found = run(
        "surgery", "prune", atlas, "--model", model, "--sparsity", 0.5, "--recover", method, *more, "-o", output, "--overwrite",
        "--quiet",
    )  # fmt: skip
    if not found["code"]:
        recovery = json.loads((output / "surgery.json").read_text()).get("recovery") or {}
        found |= {key: recovery[key] for key in ("logit_error",) if key in recovery}
    return found


if __name__ == "__main__":
    main()
