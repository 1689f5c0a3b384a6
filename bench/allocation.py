"""Compare ways to share one budget of channels among the FFNs of a dense model: the same channels' scores, the same parameters.

    python bench/allocation.py MODEL ATLAS CALIBRATION TEXT [TEXT...] [--sparsity 0.3] [--tokens 2048] [--block 256]

All allocations rank the channels of an FFN by LP, and keep the same number of channels in total (multiples of 32, at most
70% of an FFN removed). They differ in the cost of the k-th removal from an FFN:

- uniform: the same share of every FFN.
- lp: the LP of the channel. The cost of an FFN is the running sum of its sorted LP. `--allocation global --method scar-lp` does it.
- lp-root: LP over the square root of the FFN's whole LP.
- lp-share: LP over the FFN's whole LP.
- energy: E[u^2] times the squared norm of the write vector, over the sum of these in the FFN.
- refit: by how much the relative error of the FFN's output grows if the kept channels are refitted. One Cholesky
  factorisation of the channels' second moments gives the errors of all nested sets. CALIBRATION is the text for the moments.

The dense model and every cut run on the same blocks of every text. The script prints the loss above the dense model's in nats
per token, with a 95% interval over blocks (paired bootstrap, seed 0).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import chanfmt
from chanfmt.data.text import read_text
from chanfmt.hub.locate import locate_model
from chanfmt.models.load import load_model
from surgery.evaluation.perplexity import BlockLosses, paired_bootstrap
from surgery.planning.allocation import Candidate, Pool
from surgery.planning.methods import score

CAP, MULTIPLE = 0.7, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("atlas")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--allocations", default="uniform,lp,lp-root,lp-share,energy,refit")
    arguments = parser.parse_args()
    source = locate_model(arguments.model)
    model = load_model(source, dtype="float32", device="cpu")
    ids = {text: blocks_of(source.tokenizer, text, arguments.tokens, arguments.block) for text in arguments.texts}
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    with chanfmt.open(arguments.atlas) as atlas:
        lp = [score("scar-lp", atlas, block, 0) for block in atlas.blocks]
        energy = [
            np.asarray(atlas.stacks[block.stack].row("activation_power", block.row), dtype=np.float64)
            * np.asarray(atlas.stacks[block.stack].row("write_norm", block.row), dtype=np.float64) ** 2
            for block in atlas.blocks
        ]
    width = len(lp[0])
    keep = len(lp) * round(width * (1 - arguments.sparsity) / MULTIPLE) * MULTIPLE
    dense = {text: losses(model, blocks, layers, None) for text, blocks in ids.items()}
    for text, nats in dense.items():
        print(
            f"dense, {text}: {nats.mean:.4f} nats per token, {nats.predicted.sum():,} predicted tokens in {len(nats.nll)} blocks",
            flush=True,
        )
    for name in arguments.allocations.split(","):
        start = time.perf_counter()
        widths = [keep // len(lp)] * len(lp) if name == "uniform" else None
        if widths is None:
            curves = costs(name, lp, energy, lambda: moments(model, source, layers, arguments), layers)
            most = int(CAP * width)
            widths = Pool([Candidate(width, 1, curve[:most]) for curve in curves]).widths(keep, MULTIPLE)
        removed = [np.argsort(values, kind="stable")[: width - kept] for values, kept in zip(lp, widths, strict=True)]
        for text, blocks in ids.items():
            found = paired_bootstrap(dense[text], losses(model, blocks, layers, removed), seed=0)
            print(
                f"{name:9} {text}: +{found.difference:.4f} [{found.low:.4f}, {found.high:.4f}]  widths {min(widths)} to {max(widths)}, "
                f"{sum(widths):,} channels, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
        print(f"{'':9} {widths}", flush=True)


def blocks_of(tokenizer: object, text: str, tokens: int, block: int) -> torch.Tensor:
    """The first tokens of ``text``, int64 (block, position)."""
    joined = read_text(text, "evaluate").text
    ids = tokenizer(joined[: 12 * tokens]).input_ids[:tokens]  # type: ignore[operator]
    return torch.tensor(ids[: len(ids) // block * block]).reshape(-1, block)


def costs(name: str, lp: list, energy: list, measured: object, layers: list) -> list[np.ndarray]:
    """For every FFN the cost of the first removal, of the second, ..., ascending: float64 (channels,)."""
    if name == "lp":
        return [np.sort(values) for values in lp]
    if name == "lp-root":
        return [np.sort(values) / np.sqrt(values.sum()) for values in lp]
    if name == "lp-share":
        return [np.sort(values) / values.sum() for values in lp]
    if name == "energy":
        return [np.sort(values) / values.sum() for values in energy]
    if name == "refit":
        orders = [np.argsort(-values, kind="stable") for values in lp]
        return [
            refit_cost(second, layer.weight.double(), order)
            for second, layer, order in zip(measured(), layers, orders, strict=True)  # type: ignore[operator]
        ]
    raise SystemExit(f"unknown allocation {name!r}")


def refit_cost(second: torch.Tensor, write: torch.Tensor, order: np.ndarray) -> np.ndarray:
    """Growth of the relative output error for each removal, ascending, float64 (channels,), from the second moments E[u u^T].

    With the channels in the ``order`` in which they are kept, column k of the Cholesky factor is the part of the channels that
    the first k channels do not predict. Its image under the write projection is what channel k adds after a refit.
    """
    second = second[order][:, order]
    second.diagonal().add_(1e-4 * float(second.diagonal().mean()))
    parts = (write[:, order] @ torch.linalg.cholesky(second)).square().sum(0)
    # Removals go from the last channel to the first, and a pool needs ascending costs.
    return np.maximum.accumulate((parts / parts.sum()).flip(0).numpy())


def moments(model: object, source: object, layers: list, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """E[u u^T] of every FFN on the calibration text, float64 (channel, channel)."""
    sums = [torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64) for layer in layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, given, total=total: add_products(total, given[0]))
        for layer, total in zip(layers, sums, strict=True)
    ]
    blocks = blocks_of(source.tokenizer, arguments.calibration, 2 * arguments.tokens, arguments.block)  # type: ignore[attr-defined]
    with torch.inference_mode():
        for block in blocks:
            model.model(block[None])  # type: ignore[attr-defined]
    for handle in handles:
        handle.remove()
    return [total / blocks.numel() for total in sums]


def add_products(total: torch.Tensor, values: torch.Tensor) -> None:
    flat = values.flatten(0, -2)
    total += (flat.T @ flat).double()


@torch.inference_mode()
def losses(model: object, blocks: torch.Tensor, layers: list, removed: list[np.ndarray] | None) -> BlockLosses:
    """The losses of every block with the ``removed`` channels of every FFN at 0."""
    before = [layer.weight.data for layer in layers]
    for layer, gone in zip(layers, removed or [], strict=False):
        layer.weight.data = layer.weight.data.index_fill(1, torch.from_numpy(gone), 0.0)
    found = []
    for block in blocks:
        logits = model(block[None]).logits[0, :-1]  # type: ignore[operator]
        found.append(torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").double().sum().item())
    for layer, weight in zip(layers, before, strict=True):
        layer.weight.data = weight
    return BlockLosses(np.array(found), np.full(len(blocks), blocks.shape[1] - 1))


if __name__ == "__main__":
    main()
