"""A build of the large model where torch may use 24 GB: streamed, and in memory."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.items import CUDA, DEVICE, TINY, WORK, Peak, host_gigabytes, item, run
from chanfmt.models import next_token

GIGABYTES = 24
SEQUENCES, SEQ_LEN = (8, 64) if TINY else (16, 512)
MODEL = WORK / "large"


def main() -> None:
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(GIGABYTES * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    item(f"{GIGABYTES} GB: atlas build --stream", lambda: built("--stream"), most={"peak_gb": GIGABYTES})
    item(f"{GIGABYTES} GB: atlas build", built, most={"peak_gb": GIGABYTES})


def built(*more: str) -> dict[str, Any]:
    """The build, the batches that it tried, and the peak."""
    tried: list[int] = []
    real = next_token.NextTokenLoss.backward

    def backward(self: Any, ids: torch.Tensor) -> float:
        tried.append(len(ids))
        return real(self, ids)

    next_token.NextTokenLoss.backward = backward  # type: ignore[method-assign]
    peak = Peak()
    try:
        found = run(
            "atlas", "build", MODEL, "-o", WORK / "limit.h5", "--calib", MODEL / "tokens.npz", "--sequences", SEQUENCES,
            "--seq-len", SEQ_LEN, "--device", DEVICE, "--dtype", "bfloat16", "--overwrite", "--quiet", *more,
        )  # fmt: skip
    finally:
        next_token.NextTokenLoss.backward = real  # type: ignore[method-assign]
    return {**found, "batches": tried[:20], "peak_gb": peak.gigabytes(), "host_gb": host_gigabytes()}


if __name__ == "__main__":
    main()
