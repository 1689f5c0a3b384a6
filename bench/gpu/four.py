"""Four layers of the large model: built, cut, refitted, compared with the masked model, evaluated."""

from __future__ import annotations

import json
from typing import Any

from bench.gpu.checkpoints import SMALL, make
from bench.gpu.items import DEVICE, TINY, WORK, Peak, item, run
from bench.synthetic import LLAMA_8B
from surgery.cut.check import FITTED_TOLERANCE

SEQUENCES, SEQ_LEN = (16, 64) if TINY else (64, 512)
MODEL, ATLAS = WORK / "four", WORK / "four.h5"


def main() -> None:
    sizes = {**(SMALL if TINY else LLAMA_8B), "num_hidden_layers": 4}
    item(
        "four layers: write the checkpoint",
        lambda: make(MODEL, "llama", sizes, device=DEVICE, sequences=SEQUENCES, seq_len=SEQ_LEN),
    )
    item(
        "four layers: atlas build",
        lambda: run("atlas", "build", MODEL, "-o", ATLAS, "--calib", MODEL / "tokens.npz", "--sequences", SEQUENCES, "--seq-len",
                    SEQ_LEN, "--device", DEVICE, "--overwrite", "--quiet"),
    )  # fmt: skip
    item("four layers: prune, compared with the masked model", lambda: prune("none"))
    item(
        "four layers: prune --recover lstsq",
        lambda: prune("lstsq", "--recover-device", DEVICE),
        most={"logit_error": FITTED_TOLERANCE},
    )
    item(
        "four layers: eval",
        lambda: run("surgery", "eval", MODEL, WORK / "four-none", WORK / "four-lstsq", "--data", "pydoc", "--max-tokens",
                    1024 if TINY else 16384, "--seq-len", 256 if TINY else 2048, "--device", DEVICE),
    )  # fmt: skip


def prune(method: str, *more: str) -> dict[str, Any]:
    output, peak = WORK / f"four-{method}", Peak()
    found = run(
        "surgery", "prune", ATLAS, "--model", MODEL, "--sparsity", 0.5, "--recover", method, *more, "-o", output, "--overwrite",
        "--quiet",
    )  # fmt: skip
    if not found["code"] and method != "none":
        found["logit_error"] = json.loads((output / "surgery.json").read_text())["recovery"]["logit_error"]
    return found | {"peak_gb": peak.gigabytes()}


if __name__ == "__main__":
    main()
