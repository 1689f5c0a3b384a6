"""A build of a bfloat16 model of Llama-3.1-8B's shape, step by step, and the floor: the same batches without sums."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu.checkpoints import SMALL, make
from bench.gpu.items import DEVICE, TINY, WORK, Peak, host_gigabytes, item, run, timed, wait
from bench.synthetic import LLAMA_8B
from chanfmt.building import build, measure, plan
from chanfmt.building.capture import Capture
from chanfmt.building.statistics import FFNStatistics, first_overflow
from chanfmt.models import load, next_token

if TYPE_CHECKING:
    from collections.abc import Callable

SEQUENCES, SEQ_LEN = (16, 64) if TINY else (64, 512)
BATCHES = 4
MODEL = WORK / "large"


def main() -> None:
    sizes = {**SMALL, "vocab_size": 2048} if TINY else LLAMA_8B
    item("large: write the checkpoint", lambda: make(MODEL, "llama", sizes, device=DEVICE, sequences=SEQUENCES, seq_len=SEQ_LEN))
    made: dict[str, Any] = {}
    real = build.plan_build

    def keep(*args: Any, **kwargs: Any) -> Any:
        made["plan"] = real(*args, **kwargs)
        return made["plan"]

    build.plan_build = keep
    try:
        item("large: atlas build", whole)
    finally:
        build.plan_build = real
    if "plan" in made:
        # What the GPU holds now is freed before the floor: the statistics are those of the build.
        gc.collect()
        if DEVICE.startswith("cuda"):
            torch.cuda.empty_cache()
        # On tiny shapes the fixed costs of an operation count, so the ratio says nothing.
        most = None if TINY else {"ratio": 1.1, "memory_ratio": 1.2}
        item("large: pass against its floor", lambda: floor(made["plan"]), most=most)


def whole() -> dict[str, Any]:
    """The command, and what each of its steps takes."""
    batches: list[tuple[int, float]] = []
    real = next_token.NextTokenLoss.backward

    def backward(self: Any, ids: torch.Tensor) -> float:
        wait()
        began = time.perf_counter()
        nats = real(self, ids)
        wait()
        batches.append((len(ids), round(time.perf_counter() - began, 4)))
        return nats

    next_token.NextTokenLoss.backward = backward  # type: ignore[method-assign]
    try:
        with timed(
            (build, "plan_build", "plan"),
            (plan, "_loaded", "plan: load"),
            (load, "check_finite", "plan: load: finite"),
            (plan, "find_ffns", "plan: find FFNs"),
            (plan, "choose_loss", "plan: choose loss"),
            (plan, "tensor_slices", "plan: tensors of the checkpoint"),
            (build, "run_pass", "pass"),
            (measure, "_choose_cores", "pass: choose cores"),
            (build, "assemble", "labels"),
            (build, "write_atlas", "write"),
        ) as steps:
            began = time.perf_counter()
            found = run(
                "atlas", "build", MODEL, "-o", WORK / "large.h5", "--calib", MODEL / "tokens.npz", "--sequences", SEQUENCES,
                "--seq-len", SEQ_LEN, "--device", DEVICE, "--dtype", "bfloat16", "--overwrite", "--quiet",
            )  # fmt: skip
            seconds = time.perf_counter() - began
    finally:
        next_token.NextTokenLoss.backward = real  # type: ignore[method-assign]
    # write_atlas gets what assemble returns, so the step "write" does not hold the labels.
    tokens = SEQUENCES * SEQ_LEN
    ran = steps.get("pass", {}).get("seconds")
    return {
        **found,
        "command_s": round(seconds, 2),
        "tokens_per_s": round(tokens / ran) if ran else None,
        "labels_of_pass": round(steps["labels"]["seconds"] / ran, 3) if ran and "labels" in steps else None,
        "host_gb": host_gigabytes(),
        "steps": steps,
        "batches": batches,
    }


def floor(plan: Any) -> dict[str, Any]:
    """Seconds and memory of the pass against a bare forward pass and a backward pass along activations."""
    model, loss, size = plan.model, plan.loss, 2 if TINY else 8
    ids = [plan.tokens.batch(start, start + size, model) for start in range(0, BATCHES * size, size)]

    def bare(batch: torch.Tensor) -> None:
        handle = model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_(True))
        loss.backward(batch)
        handle.remove()

    found = [FFNStatistics(ffn, model.get_parameter(ffn.write).device) for ffn in plan.ffns]
    capture = Capture(model, plan.ffns, found)

    def ours(batch: torch.Tensor) -> None:
        capture.begin(len(batch), 0)
        with capture.running():
            loss.backward(batch)
        first_overflow(found)
        for sums in found:
            for member in sums.members:
                if member.core is None:
                    member.choose_core(plan.settings.rho)

    seconds: dict[str, list[float]] = {}
    memory = {}
    for name, contender in (("bare", bare), ("ours", ours)):
        # The first batch prepares what later batches use: kernels and, for the sums, the cores.
        contender(ids[0])
        wait()
        peak = Peak()
        seconds[name] = [timed_once(contender, batch) for batch in ids]
        memory[name] = peak.gigabytes()
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    return {
        "bare_s": round(statistics.median(seconds["bare"]), 4),
        "ours_s": round(statistics.median(seconds["ours"]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "bare_gb": memory["bare"],
        "ours_gb": memory["ours"],
        "memory_ratio": round(memory["ours"] / memory["bare"], 3),
        "batch": size,
    }


def timed_once(contender: Callable[[torch.Tensor], None], batch: torch.Tensor) -> float:
    wait()
    began = time.perf_counter()
    contender(batch)
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
