"""The descent of an adaptation in products of 16 bits ends where that in float32 ends."""

from __future__ import annotations

import contextlib

import pytest
import torch

from surgery.recovery.adapt import adapt
from surgery.recovery.folds import Batch
from surgery.recovery.precision import descent_dtype, half_products
from surgery.recovery.writes import Leaf, Write

CPU = torch.device("cpu")


class Linear:
    """Two matrices in a row that should compute a third one."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(10, 64, 16, generator=random)
        self.read = torch.randn(12, 16, generator=random) / 4
        self.write = torch.randn(8, 12, generator=random) / 4
        self.right = self.write + 0.02 * torch.randn(8, 12, generator=random)

    def output(self, place: int, write: Write) -> torch.Tensor:
        return write.of(torch.nn.functional.linear(self.inputs[place], self.read).float())

    def wanted(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[place] @ self.read.T @ self.right.T, torch.ones(64)

    def scale(self, place: int) -> float:
        return float(self.wanted(place)[0].square().sum())


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16])
def test_a_descent_in_bfloat16_ends_where_that_in_float32_ends(outside: torch.dtype) -> None:
    """Also where all products are in bfloat16, as on a GPU: the weights that a step changed are those of the next step."""
    batches = [Batch(torch.zeros(4, 16, dtype=torch.int64), 0, number >= 8) for number in range(10)]
    errors = []
    for kind, context in ((torch.float32, contextlib.nullcontext()), (torch.bfloat16, half_products(CPU, outside))):
        target = Linear()
        with context:
            found = adapt(target, batches, [Leaf(target.read)], Write(target.write), 0, lambda count: None, kind)
        assert found.epoch == 4
        errors.append(found.errors[0, True])
        start = found.held_out_before
    assert start is not None
    assert errors[0] < start / 4
    assert errors[1] == pytest.approx(errors[0], rel=0.05, abs=2e-5)


def test_the_dtype_of_a_descent_is_one_that_the_device_multiplies_fast() -> None:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    assert descent_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)
    assert descent_dtype(torch.device("meta")) == torch.float32
