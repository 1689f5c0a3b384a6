"""The map of a model's FFNs to checkpoint tensors, at sizes that real models have."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chanfmt.models.ffn import Matrix, Member, Projection, Read
from chanfmt.models.find.discover import Found, assemble
from chanfmt.models.safetensors import CheckpointIndex, TensorEntry
from chanfmt.models.stored.layout import tensor_slices
from chanfmt.models.streaming.parameters import weightless

EXPERTS, HIDDEN, WIDTH = 128, 2048, 768
LARGEST = 4 << 20


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor in memory that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and not item.is_meta:
                self.nbytes = max(self.nbytes, item.untyped_storage().nbytes())
        return result


def test_many_wide_experts_take_little_memory():
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_experts=EXPERTS,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = weightless(transformers.AutoModelForCausalLM, config, torch.bfloat16)
    prefix = "model.layers.0.mlp.experts"
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    index = CheckpointIndex(
        Path("nowhere"),
        {
            f"{prefix}.{expert}.{name}_proj.weight": TensorEntry(Path("nowhere"), "BF16", shape, 0, 2 * HIDDEN * WIDTH)
            for expert in range(EXPERTS)
            for name, shape in shapes.items()
        },
    )
    both = Projection(Matrix(f"{prefix}.gate_up_proj", 0, 0, False, HIDDEN, 2 * WIDTH), None)
    down = Projection(Matrix(f"{prefix}.down_proj", 0, 0, False, WIDTH, HIDDEN), None)
    found = Found(Member(down, (Read(both, "gate", 0, 1), Read(both, "up", WIDTH, 1))), False)
    (ffn,) = assemble(model, [found], lambda: True)
    tracemalloc.start()
    try:
        with Largest() as torchs:
            slices = tensor_slices(model, ffn, index)
        _, numpys = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Written out, one coordinate would take 1.6 GB for one of the two parameters, and 6 MB for one expert.
    assert torchs.nbytes < LARGEST
    assert numpys < 4 * LARGEST
    assert [(item.role, item.tensor, item.axis, item.start, item.stop, item.index) for item in slices] == [
        (role, f"{prefix}.{expert}.{name}_proj.weight", axis, 0, WIDTH, None)
        for expert in range(EXPERTS)
        for role, name, axis in (("gate", "gate", 0), ("up", "up", 0), ("write", "down", 1))
    ]
