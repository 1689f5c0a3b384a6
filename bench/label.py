"""Seconds that labelling one FFN takes, of the shape of an 8B model by default, and the share of a pass.

    OMP_NUM_THREADS=1 python bench/label.py [--channels 14336] [--hidden 4096] [--tokens 128] [--dtype bfloat16] [--device cpu]

The pass of an FFN is a forward pass, a backward pass along activations, and the sums. Labelling is everything that follows,
from the metrics of the weights to the labels.

A pass over the tokens of a default build takes minutes for one such FFN. The script measures the pass over few tokens and the
speed of its products, and computes from that speed what the products of a whole pass take: three matrices in each direction,
12 FLOP per channel, dimension and token. The sums and the attention come on top, so labelling is a smaller share than printed.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from chanfmt.building.derive import member_variables
from chanfmt.building.statistics import ChannelStatistics
from chanfmt.format.records import LabelSettings
from chanfmt.models.matrices import FFNWeights

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = 3
DEFAULT_TOKENS = 64 * 512
"""Calibration tokens of a build."""


def measured(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Least wall and CPU seconds of `RUNS` runs of ``work``."""
    walls, cpus = [], []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--channels", type=int, default=14336)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, m, d = torch.device(options.device), options.channels, options.hidden
    dtype = getattr(torch, options.dtype)
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).to(device, dtype)

    weights = FFNWeights(drawn(d, m), {"gate": drawn(m, d), "up": drawn(m, d)})
    statistics = ChannelStatistics(m, d, device)
    hidden, gradient = drawn(2, options.tokens // 2, d), drawn(2, options.tokens // 2, d)

    def run_pass() -> None:
        gate, up = hidden @ weights.reads["gate"].T, hidden @ weights.reads["up"].T
        u = functional.silu(gate) * up
        u @ weights.write.T
        s = gradient @ weights.write
        statistics.add_read_input(hidden)
        statistics.add(u, s, 0)
        s @ weights.reads["gate"]
        s @ weights.reads["up"]

    run_pass()
    statistics.choose_core(0.01)
    support = np.arange(256)
    print(f"{m} channels, d {d}, {options.dtype}, {device}, {torch.get_num_threads()} threads")
    print("seconds: least of wall time and of CPU time")
    wall, cpu = measured(run_pass, device)
    print(f"pass over {options.tokens} tokens: {wall:.3f} s, {cpu:.3f} CPU s")
    u = gradient @ weights.write
    _, seconds = product = measured(lambda: u @ weights.write.T, device)
    if device.type != "cpu":
        seconds = product[0]
    rate = 2 * options.tokens * m * d / seconds
    print(f"one product of {options.tokens} tokens: {seconds:.3f} s, {rate / 1e9:,.1f} GFLOP/s")
    wall, cpu = measured(lambda: member_variables(statistics, weights, LabelSettings(), support), device)
    print(f"labelling: {wall:.3f} s, {cpu:.3f} CPU s")
    whole, labelling = 12 * m * d * DEFAULT_TOKENS / rate, cpu if device.type == "cpu" else wall
    print(
        f"products of a pass over {DEFAULT_TOKENS} tokens, computed: {whole:.3f} s; labelling takes {labelling / whole:.2%} of that"
    )


if __name__ == "__main__":
    main()
