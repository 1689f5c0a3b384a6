"""Plans made by hand, and checkpoints read back."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from chanfmt.models.load import load_model
from chanfmt.models.safetensors import CheckpointIndex, fingerprint
from chanfmt.models.source import ModelSource
from chanfmt.models.stored.layout import tensor_slices
from surgery.cut.inputs import check_inputs
from surgery.planning.plan import BlockPlan, PlannedModel, PruningPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from chanfmt.format.records import TensorSlice

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


WIDTH = 13


KEPT = np.array([0, 3, 4, 9, 12], dtype=np.int32)


def plan_of(*blocks: tuple[TensorSlice, ...], kept: np.ndarray = KEPT, width: int = WIDTH) -> PruningPlan:
    """A plan that keeps ``kept`` in every block."""
    model = PlannedModel("tests/plan", "", "local", "llama", (), "0" * 64)
    planned = tuple(
        BlockPlan(f"layer.{layer}", layer, "decoder", f"layer.{layer}", "decoder", width, 0, tensors, kept, 0, 0, None)
        for layer, tensors in enumerate(blocks)
    )
    return PruningPlan(
        model=model,
        method="random",
        protection=(),
        unprotect=(),
        protected=0,
        released=0,
        seed=0,
        sparsity=0.5,
        multiple_of=None,
        allocation="uniform",
        max_layer_sparsity=None,
        layers=None,
        stack=(),
        invert=False,
        scope_channels=width * len(planned),
        atlas_sha256="",
        calibration="",
        check_tokens=(),
        blocks=planned,
    )


def planned(directory: Path, keep: Callable[[int, Any], int], seed: int = 0) -> PruningPlan:
    """A plan that keeps ``keep(number, ffn)`` random channels of every FFN of the model, other ones in every expert."""
    random = np.random.default_rng(seed)
    model = load_model(ModelSource(directory), dtype="float32", device="cpu")
    index = CheckpointIndex.open(directory)
    blocks = []
    stacks: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for number, ffn in enumerate(check_inputs(model, (), 0).find_ffns(model)):
        count = keep(number, ffn)
        lines = [np.sort(random.permutation(ffn.width)[:count]).astype(np.int32) for _ in ffn.members]
        kept = np.stack(lines) if ffn.experts else lines[0]
        stack = stacks[ffn.place, ffn.kind].setdefault(ffn.width, f"{ffn.place}.{ffn.kind}-{ffn.width}")
        blocks.append(
            BlockPlan(
                f"{ffn.container}#{number}",
                ffn.layer_index,
                ffn.place,
                ffn.container,
                stack,
                ffn.width,
                ffn.experts,
                tensor_slices(model, ffn, index),
                kept,
                0,
                0,
                None,
            )
        )
    config = json.loads((directory / "config.json").read_text())
    record = PlannedModel(
        "tests/layout", "", "local", config["model_type"], tuple(config.get("architectures") or ()), fingerprint(index)
    )
    channels = sum(block.n_channels * max(1, block.n_experts) for block in blocks)
    return dataclasses.replace(empty_plan(), model=record, blocks=tuple(blocks), scope_channels=channels)


def empty_plan() -> PruningPlan:
    from tests.support.plans import plan_of

    return plan_of()


def read(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in CheckpointIndex.open(directory).files:
        tensors |= load_file(file)
    return tensors
