"""Tensors that repeat themselves have torch's values and shapes, and take the memory of the elements that do not repeat."""

from __future__ import annotations

import pytest
import torch

from chanfmt.models.stored.repeated import Unwritten


def line(axis, shape=(3, 4, 6), start=0):
    positions = torch.arange(start, start + shape[axis])
    return positions.reshape([-1 if other == axis else 1 for other in range(3)]).expand(shape)


OPERATIONS = {
    "contiguous": lambda a, b: a.transpose(1, 2).contiguous(),
    "cat": lambda a, b: torch.cat([a, b, a], dim=1),
    "cat of the same": lambda a, b: torch.cat([a, a], dim=-1),
    "stack": lambda a, b: torch.stack([a, b], dim=1),
    "stack of the same": lambda a, b: torch.stack([a, a], dim=-1),
    "reshape": lambda a, b: a.reshape(3, 2, 2, 6),
    "reshape to a list": lambda a, b: torch.reshape(a, [3, -1, 6]),
    "reshape of all": lambda a, b: a.reshape(-1),
    "reshape to more axes": lambda a, b: a.reshape(3, 4, 6, 1),
    "view of what torch would have made contiguous": lambda a, b: a.transpose(0, 1).contiguous().view(12, 6),
    "view as another type": lambda a, b: a.contiguous().view(torch.int64),
    "interleave": lambda a, b: a.reshape(3, 2, 2, 6).transpose(1, 2).reshape(a.shape).contiguous(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("axis", range(3))
def test_values_are_those_of_torch(operation, axis):
    a, b = line(axis), line(axis, start=10)
    with Unwritten():
        found = OPERATIONS[operation](a, b)
    assert torch.equal(found, OPERATIONS[operation](a, b))


@pytest.mark.parametrize("operation", ["contiguous", "cat", "stack", "stack of the same", "reshape", "interleave"])
@pytest.mark.parametrize("axis", range(3))
def test_what_repeats_is_not_written_out(operation, axis):
    with Unwritten():
        found = OPERATIONS[operation](line(axis), line(axis, start=10))
    assert found.untyped_storage().nbytes() <= found.nbytes / 3
