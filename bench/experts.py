"""Operations that the sums of experts cost in one batch: ``python bench/experts.py [--experts 16] [--device cpu]``.

A random Mixtral of two blocks runs one batch forward and backward along activations, without and with the sums, after the core is
chosen. Counted are the operations that torch dispatches, views included, and among them those that make a GPU wait for the CPU. On
a GPU, a batch of many small experts takes as long as its operations take to start.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from chanfmt.building.capture import Capture
from chanfmt.building.statistics import FFNStatistics, first_overflow
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = 2
RHO = 0.01
REPEATED = 7
WAITS = ("_local_scalar_dense", "nonzero", "equal")
"""Operations whose result the CPU waits for."""


class Counted(TorchDispatchMode):
    """Counts the operations of the body by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=arguments.experts,
        num_experts_per_tok=4,
        max_position_embeddings=256,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(arguments.device)
    ffns = find_ffns(model)
    ids = torch.randint(0, 256, (4, 64), device=arguments.device)
    loss = NextTokenLoss(model, ids[:1])
    found = [FFNStatistics(ffn, ids.device) for ffn in ffns]
    for member in (member for item in found for member in item.members):
        member.set_core(torch.arange(member.candidate_count(RHO)))

    def bare() -> None:
        handle = model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_(True))
        with eager_experts(model):
            loss.backward(ids)
        handle.remove()

    def ours() -> None:
        capture = Capture(model, ffns, found)
        with capture.running():
            capture.begin(len(ids), 1)
            loss.backward(ids)
        first_overflow(found)

    print(f"torch {torch.__version__}, {arguments.experts} experts, {BLOCKS} blocks, {arguments.device}")
    for name, run in (("bare", bare), ("ours", ours)):
        report(name, run, arguments.experts * BLOCKS)


def report(name: str, run: Callable[[], None], experts: int) -> None:
    """Print the operations and the milliseconds of ``run``, which runs ``experts`` experts."""
    run()
    with Counted() as counted:
        run()
    taken = []
    for _ in range(REPEATED):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    total, waits = sum(counted.found.values()), sum(counted.found[wait] for wait in WAITS)
    print(
        f"{name:<5}{total:>6} operations, {total / experts:6.1f} per expert and batch; {waits:>4} waits, {waits / experts:.2f}; "
        f"{1e3 * statistics.median(taken):6.1f} ms"
    )


if __name__ == "__main__":
    main()
