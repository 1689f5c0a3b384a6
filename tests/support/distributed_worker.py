"""What each process of test_distributed.py's own group runs.

torchrun ... -m tests.support.distributed_worker SUMS MODEL ATLAS: checks the group itself, writes what `measure` sums,
and builds an atlas.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.building.measure import measure
from chanfmt.building.options import BuildOptions
from chanfmt.data.tokens import canonical
from chanfmt.format.records import LabelSettings
from chanfmt.models.distributed import Group, joined
from chanfmt.models.find.discover import find_ffns
from tests.support.builds import build
from tests.support.tiny import random_tokens, tiny_model

SEQUENCES = 80
SEQ_LEN = 24


def main(sums: str, model: str, atlas: str) -> None:
    with joined("cpu") as group:
        check_messages(group)
        check_sums(group)
        check_failures(group)
        measure_with_little_memory(group, sums)
    # A script may build as often as it likes.
    build(
        BuildOptions(model, atlas, calib="pydoc", sequences=20, seq_len=32, batch_size="2", dtype="float64", columns="all"),
        LabelSettings(rho=0.03, support_size=8),
    )


def check_messages(group: Group) -> None:
    assert group.exchange(f"from {group.rank}") == [f"from {rank}" for rank in range(group.size)]
    parts = group.exchange(group.share(10, 17))
    assert parts[0][0] == 10
    assert parts[-1][1] == 17
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))


def check_sums(group: Group) -> None:
    """Tensors of several sizes, some of them larger than a buffer; a second collection adds nothing."""
    sums = [torch.full(shape, group.rank + 1.0, dtype=torch.float64) for shape in ((3,), (2, 5), ((1 << 23) + 1,), (7,))]
    maxima = [torch.tensor([float(group.rank), -float(group.rank)]), torch.zeros(4)]
    for _ in range(2):
        group.collect(sums, maxima)
        total = sum(range(1, group.size + 1)) if group.rank == 0 else 0
        assert all(bool((tensor == total).all()) for tensor in sums)
        assert maxima[0].tolist() == ([group.size - 1.0, 0.0] if group.rank == 0 else [0.0, 0.0])


def check_failures(group: Group) -> None:
    """An error in one process is raised in all processes."""

    def refuse() -> int:
        if group.rank == 1:
            raise UsageError("only here", hint="look")
        raise torch.OutOfMemoryError("elsewhere")

    def run_out() -> int:
        if group.rank == 1:
            raise torch.OutOfMemoryError("too much")
        return group.rank

    with pytest.raises(ChanfmtError) as caught:
        group.together(refuse)
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("only here", "look", 2)

    def run_out_in_other_words() -> int:
        if group.rank == 1:
            raise RuntimeError("CUDA error: out of memory")
        return group.rank

    def break_down() -> int:
        if group.rank == 1:
            raise IndexError("a fault of the program")
        return group.rank

    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        group.together(run_out)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error"):
        group.together(run_out_in_other_words)
    with pytest.raises(IndexError if group.rank == 1 else ChanfmtError, match="a fault of the program"):
        group.together(break_down)
    assert group.together(lambda: group.rank) == group.rank


def measure_with_little_memory(group: Group, output: str) -> None:
    """The last process runs out of memory in the middle of the pass; all halve their batches, and count nothing twice."""
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    met = []

    def too_large(module: object, args: tuple[torch.Tensor, ...]) -> None:
        if group.rank == group.size - 1 and torch.is_grad_enabled() and args[0].shape[0] > 2:
            met.append(args[0].shape[0])
            if len(met) > 1:
                raise torch.OutOfMemoryError("this batch does not fit")

    model.model.layers[2].mlp.register_forward_pre_hook(too_large)
    counts: list[int] = []
    found = measure(
        model,
        find_ffns(model),
        canonical(random_tokens(SEQUENCES, SEQ_LEN).numpy()),
        rho=0.03,
        progress=counts.append,
        group=group,
    )
    sizes = group.exchange(found.batch_size)
    assert sizes[0] < 2048 // SEQ_LEN
    assert len(set(sizes)) == 1
    assert sum(counts) == SEQUENCES * SEQ_LEN
    if group.rank:
        assert found.loss == 0
    else:
        torch.save((found.loss, [item.state() for item in found.statistics]), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
