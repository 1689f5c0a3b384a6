"""Atlases of the size of real ones, for the other scripts."""

from __future__ import annotations

import numpy as np

import chanfmt
from chanfmt.algebra.labels import support_sizes
from chanfmt.format import schema
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    StackData,
    TensorSlice,
)

HIDDEN = 4096


def synthetic_content(layers: int, experts: int, channels: int) -> AtlasContent:
    """An atlas with every variable of the format and as many tensors as a real model. Its values are heavy-tailed noise."""
    random = np.random.default_rng(0)
    kind = "experts" if experts else "dense"
    sequences, seq_len = 64, 512
    settings = LabelSettings()
    supports = support_sizes(HIDDEN, settings.support_size)
    lengths = {
        "layer": layers,
        "expert": experts,
        "channel": channels,
        "split": schema.SPLITS,
        "support": len(supports),
        "nearest": schema.NEAREST,
    }
    variables = {}
    for variable in schema.STACK_VARIABLES:
        shape = tuple(lengths[name] for name in schema.stack_dimensions(variable, kind))
        if variable.dtype.startswith("f"):
            variables[variable.name] = np.exp(2 * random.standard_normal(shape, dtype=np.float32))
        else:
            variables[variable.name] = random.integers(0, 3, shape).astype(variable.dtype)
    blocks = []
    for layer in range(layers):
        owners = [f"model.layers.{layer}.mlp" + (f".experts.{expert}" if experts else "") for expert in range(max(experts, 1))]
        tensors = tuple(
            TensorSlice(role, f"{owner}.{name}.weight", f"{owner}.{name}.weight", axis, 0, channels)
            for owner in owners
            for role, name, axis in (("gate", "gate_proj", 0), ("up", "up_proj", 0), ("write", "down_proj", 1))
        )
        blocks.append(Block(layer, layer, "decoder", f"model.layers.{layer}.mlp", "decoder", layer, channels, experts, tensors))
    stack = StackData("decoder", kind, True, "silu", np.arange(layers), channels, experts, schema.SPLITS, variables, supports)
    return AtlasContent(
        title="importance atlas of noise",
        model=ModelRecord("bench/noise", "", "local", "llama", ("LlamaForCausalLM",), "{}", "0" * 64, "float32", 1, "f" * 64),
        calibration=CalibrationRecord(
            schema.LOSSES["next-token"],
            schema.METRIC_DEFINITION,
            "none",
            seq_len,
            0,
            1.0,
            tuple(f"{index:064x}" for index in range(sequences)),
            np.zeros(sequences, dtype=np.int32),
            np.arange(sequences, dtype=np.uint8) * schema.SPLITS // sequences,
            (Contribution("c" * 32, "noise", "", f"0:{sequences}", sequences, sequences * seq_len, "bench"),),
            random.integers(0, 1000, (sequences, seq_len)).astype(np.int32),
        ),
        labels=settings,
        core_rho=settings.rho,
        blocks=tuple(blocks),
        stacks=(stack,),
        producer=ProducerRecord({"chanfmt": chanfmt.__version__}, "bench", "cpu", 1.0, 1),
    )
