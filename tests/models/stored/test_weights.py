"""Weights read from the files by numpy are those that torch holds after loading."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from chanfmt.base.errors import ModelError
from chanfmt.format.records import Block, TensorSlice
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.stored.weights import StoredWeights

DTYPES = ["float64", "float32", "float16", "bfloat16"]
WIDTH, HIDDEN = 7, 5


def block(*tensors, experts=0):
    return Block(0, 0, "decoder", "mlp", "decoder", 0, WIDTH, experts, tensors)


def rows(role, name="read", start=0, step=1):
    return TensorSlice(role, name, name, 0, start, start + WIDTH * step, step)


WRITE = TensorSlice("write", "write", "write", 1, 0, WIDTH)


@pytest.fixture
def checkpoint(tmp_path):
    def save(dtype, **tensors):
        generator = torch.Generator().manual_seed(0)
        made = {
            "write": torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64),
            "read": torch.randn(2 * WIDTH, HIDDEN, generator=generator, dtype=torch.float64),
            **tensors,
        }
        # Ties of rounding to 8 bits, a number that rounds up to the next power, subnormals, zeros, NaN.
        made["write"][0] = torch.tensor([1.00390625, 1.01171875, 1.99999, 1e-39, -0.0, float("nan"), -3.3e38])
        made = {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
        save_file(made, tmp_path / "model.safetensors")
        return CheckpointIndex.open(tmp_path), made

    return save


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("ran", DTYPES)
def test_every_dtype_as_torch_rounds_it(stored, ran, checkpoint):
    index, tensors = checkpoint(getattr(torch, stored))
    found = StoredWeights(index, ran).ffn(block(rows("up"), WRITE))
    for values, tensor in ((found.write, tensors["write"]), (found.reads[0], tensors["read"][:WIDTH])):
        expected = tensor.to(getattr(torch, ran)).to(torch.float64 if ran == "float64" else torch.float32)
        assert str(values.dtype) == str(expected.dtype).removeprefix("torch.")
        assert torch.equal(torch.from_numpy(values.copy()).nan_to_num(9.0), expected.nan_to_num(9.0))


def test_experts_stacked_in_one_tensor(checkpoint):
    index, tensors = checkpoint(torch.bfloat16, reads=torch.randn(3, WIDTH, HIDDEN), writes=torch.randn(3, WIDTH, HIDDEN))
    slices = [
        TensorSlice(role, name, name, 1, 0, WIDTH, 1, expert)
        for expert in range(3)
        for role, name in (("up", "reads"), ("write", "writes"))
    ]
    weights = StoredWeights(index, "bfloat16")
    for expert in range(3):
        found = weights.ffn(block(*slices, experts=3), expert)
        assert torch.equal(torch.from_numpy(found.reads[0].copy()), tensors["reads"][expert].float())
        assert torch.equal(torch.from_numpy(found.write.copy()), tensors["writes"][expert].T.float())
    beyond = block(*(dataclasses.replace(item, index=3) for item in slices), experts=3)
    with pytest.raises(ModelError, match="are not in the tensor"):
        weights.ffn(beyond)


def test_fused_interleaved_and_transposed(checkpoint):
    index, tensors = checkpoint(torch.bfloat16, transposed=torch.randn(WIDTH, HIDDEN), across=torch.randn(HIDDEN, WIDTH))
    weights = StoredWeights(index, "bfloat16")

    def same(values, tensor):
        return torch.equal(torch.from_numpy(values.copy()), tensor.float())

    fused = weights.ffn(block(rows("gate"), rows("up", start=WIDTH), WRITE))
    assert same(fused.reads[0], tensors["read"][:WIDTH])
    assert same(fused.reads[1], tensors["read"][WIDTH:])
    interleaved = weights.ffn(block(rows("gate", step=2), rows("up", start=1, step=2), WRITE))
    assert same(interleaved.reads[0], tensors["read"][::2])
    assert same(interleaved.reads[1], tensors["read"][1::2])
    conv = weights.ffn(
        block(TensorSlice("up", "across", "across", 1, 0, WIDTH), TensorSlice("write", "transposed", "transposed", 0, 0, WIDTH))
    )
    assert same(conv.reads[0], tensors["across"].T)
    assert same(conv.write, tensors["transposed"].T)


def test_experts_are_told_apart_by_their_order(checkpoint):
    index, tensors = checkpoint(torch.float32, other=torch.ones(HIDDEN, WIDTH))
    table = block(rows("up"), WRITE, rows("up", start=WIDTH), TensorSlice("write", "other", "other", 1, 0, WIDTH), experts=2)
    weights = StoredWeights(index, "float32")
    assert weights.ffn(table, 1).write.tolist() == tensors["other"].tolist()
    assert weights.ffn(table, 1).reads[0].tolist() == tensors["read"][WIDTH:].tolist()
    with pytest.raises(ModelError, match="2 write tensors"):
        weights.ffn(block(*table.tensors))


def test_what_cannot_be_read(checkpoint):
    index, _ = checkpoint(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="stored as F8_E4M3"):
        StoredWeights(index, "bfloat16").ffn(block(rows("up"), WRITE))
    with pytest.raises(ModelError, match="measured in int8"):
        StoredWeights(index, "int8")
