"""One build by several processes: one for each GPU over nccl, or two on CPUs over gloo."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import torch

from bench.gpu.checkpoints import SMALL, make
from bench.gpu.compare import differences
from bench.gpu.items import CUDA, DEVICE, TINY, WORK, item

SEQUENCES, SEQ_LEN = (16, 32) if TINY else (64, 256)
MODEL = WORK / "group"


def main() -> None:
    processes = torch.cuda.device_count() if CUDA else 2
    item("group: write the checkpoint", lambda: make(MODEL, "llama", SMALL, device="cpu", sequences=SEQUENCES, seq_len=SEQ_LEN))
    # torchrun --nproc-per-node 1 makes no group, so a machine with one GPU measures what torchrun itself adds.
    item(f"group: atlas build in {processes} processes, {'nccl' if CUDA else 'gloo'}", lambda: against_one(processes))


def against_one(processes: int) -> dict[str, Any]:
    """Differences between the atlas of ``processes`` processes and that of one."""
    for name, more in (
        ("one", ["-m", "chanfmt"]),
        ("many", ["-m", "torch.distributed.run", "--nproc-per-node", processes, "-m", "chanfmt"]),
    ):
        command = [
            sys.executable, *more, "build", MODEL, "-o", WORK / f"{name}.h5", "--calib", MODEL / "tokens.npz", "--sequences",
            SEQUENCES, "--seq-len", SEQ_LEN, "--batch-size", 1, "--dtype", "float32", "--device", "cuda" if CUDA else DEVICE,
            "--overwrite", "--quiet",
        ]  # fmt: skip
        # A file, because a pipe would stay open as long as any process that torchrun has left.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run([str(word) for word in command], stdout=said, stderr=said, timeout=300)
            said.seek(0)
            if done.returncode:
                return {"code": done.returncode, "said": said.read().strip().splitlines()[-5:]}
    return {"processes": processes, **differences(WORK / "one.h5", WORK / "many.h5")}


if __name__ == "__main__":
    main()
