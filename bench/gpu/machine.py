"""The machine: versions, memory, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import platform
import shutil
import time
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
import transformers

from bench.gpu.items import CUDA, DEVICE, TINY, WORK, item, wait

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    item("machine: versions and memory", versions)
    item("machine: copies and products", rates)


def name() -> str:
    """Name of the hardware that the bench measures."""
    if CUDA:
        return torch.cuda.get_device_name(0)
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"machine": name(), "python": platform.python_version()}
    found |= {module.__name__: module.__version__ for module in (torch, transformers, np, h5py)}
    found["host_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    found["disk_free_gb"] = round(shutil.disk_usage(WORK).free / 1e9, 1)
    if CUDA:
        found |= {"gpus": torch.cuda.device_count(), "gpu_gb": round(torch.cuda.mem_get_info()[1] / 1e9, 1)}
    return found


def rates() -> dict[str, Any]:
    """Bytes copied and products computed in a second: what the times of the other steps can be compared with."""
    size, channels = (512, 1024) if TINY else (8192, 14336)
    source = torch.ones(1 << (22 if TINY else 28), device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": round(2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9, 1)}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(size, size, device=DEVICE, dtype=dtype)
        key = str(dtype).removeprefix("torch.")
        found[f"{key}_tflop_per_s"] = round(2 * size**3 / seconds(lambda square=square: square @ square) / 1e12, 3)
    # The products of the cross moments: q of all channels with q of the candidate core.
    q, core = torch.ones(4096, channels, device=DEVICE), torch.ones(4096, channels // 20, device=DEVICE)
    found["cross_tflop_per_s"] = round(2 * q.numel() * core.shape[1] / seconds(lambda: q.T @ core) / 1e12, 3)
    return found


def seconds(work: Callable[[], object]) -> float:
    """Least seconds of five runs, after one that prepares."""
    work()
    found = []
    for _ in range(5):
        wait()
        began = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
