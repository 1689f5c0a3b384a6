"""What `atlas build` costs beside the passes it cannot do without. Prints ratios of one run.

    python bench/build.py [SEQUENCES]

Side by side, batch by batch, on SmolLM2-135M (SMOLLM2_GGUF names the file): the bare forward and
activation-only backward of the same batches with the same chunked loss, and our measuring pass.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch

from chanfmt.models.discover import find_ffns
from chanfmt.models.load import load_model, load_tokenizer
from chanfmt.models.resolve import resolve_model
from chanfmt.produce.capture import Capture
from chanfmt.produce.loss import NextTokenLoss
from chanfmt.produce.statistics import FFNStatistics
from chanfmt.produce.text import read_text
from chanfmt.produce.tokens import sample, tokenize

SEQ_LEN, BATCH = 512, 4


def main() -> None:
    batches = max(2, int(sys.argv[1]) // BATCH) if len(sys.argv) > 1 else 6
    resolved = resolve_model(os.environ["SMOLLM2_GGUF"])
    model = load_model(resolved)
    ffns = find_ffns(model)
    tokens = sample(tokenize(load_tokenizer(resolved), read_text("pydoc", "calibrate")), batches * BATCH, SEQ_LEN, 0, "pydoc")
    ids = torch.from_numpy(tokens.ids).long()
    loss = NextTokenLoss(model, ids[:1])
    sums = [FFNStatistics(ffn, torch.device("cpu")) for ffn in ffns]
    capture = Capture(model, ffns, sums)

    def bare(batch: torch.Tensor) -> None:
        # The gradient must start somewhere: at the embeddings, as a bare loop would have it.
        handle = model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_(True))
        loss.backward(batch)
        handle.remove()

    def ours(batch: torch.Tensor) -> None:
        capture.begin(BATCH, 0)
        with capture.running():
            loss.backward(batch)

    bare(ids[:BATCH])
    ours(ids[:BATCH])
    for statistic in sums:
        statistic.members[0].choose_core(0.01)
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for start in range(0, batches * BATCH, BATCH):
        for name, run in (("bare", bare), ("ours", ours)):
            began = time.perf_counter()
            run(ids[start : start + BATCH])
            seconds[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["ours"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:<6} median {statistics.median(values):6.2f} s a batch of {BATCH} x {SEQ_LEN} tokens")
    print(f"ours / bare, pair by pair: median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})")


if __name__ == "__main__":
    main()
