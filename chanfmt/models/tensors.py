"""Where each FFN lies in the checkpoint files: tensor names, axes and slices, checked by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from chanfmt.errors import ModelError
from chanfmt.records import TensorSlice

if TYPE_CHECKING:
    from chanfmt.models.checkpoint import CheckpointIndex
    from chanfmt.models.discover import FFN


def tensor_slices(model: nn.Module, ffn: FFN, index: CheckpointIndex) -> tuple[TensorSlice, ...]:
    """Every read and write weight and bias of ``ffn`` as a slice of a checkpoint tensor.

    Raises:
        ModelError: A parameter is not stored as it is in memory (transformers converted it on load).
    """
    slices = []
    for read in ffn.reads:
        module = model.get_submodule(read.module)
        stop = read.start + (ffn.width - 1) * read.step + 1
        axis = 1 if isinstance(module, Conv1D) else 0
        slices.append(_slice(model, index, read.role, f"{read.module}.weight", axis, read.start, stop, read.step))
        if module.bias is not None:
            slices.append(
                _slice(model, index, f"{read.role}_bias", f"{read.module}.bias", 0, read.start, stop, read.step)
            )
    module = model.get_submodule(ffn.write)
    axis = 0 if isinstance(module, Conv1D) else 1
    slices.append(_slice(model, index, "write", f"{ffn.write}.weight", axis, 0, ffn.width, 1))
    if module.bias is not None:
        slices.append(_slice(model, index, "write_bias", f"{ffn.write}.bias", None, 0, 0, 1))
    return tuple(slices)


def checkpoint_name(model: Any, parameter: str, index: CheckpointIndex) -> str:
    """Name in the files of the parameter called ``parameter`` in memory.

    A checkpoint saved from the base model lacks the head's prefix (or has one too many); anything
    else is a conversion that we do not follow.

    Raises:
        ModelError: No tensor of that name has the parameter's shape and values.
    """
    prefix = f"{model.base_model_prefix}."
    candidates = [parameter, parameter.removeprefix(prefix), prefix + parameter]
    value = model.get_parameter(parameter)
    for name in dict.fromkeys(candidates):
        entry = index.tensors.get(name)
        if entry is not None and entry.shape == tuple(value.shape) and _same_values(index, name, value):
            return name
    raise ModelError(
        f"the checkpoint stores {parameter} under another name or in another form",
        hint="load the model with transformers, save it with save_pretrained, and use that directory",
    )


def _slice(
    model: Any, index: CheckpointIndex, role: str, parameter: str, axis: int | None, start: int, stop: int, step: int
) -> TensorSlice:
    return TensorSlice(role, checkpoint_name(model, parameter, index), parameter, axis, start, stop, step)


def _same_values(index: CheckpointIndex, name: str, value: torch.Tensor) -> bool:
    from safetensors import safe_open

    with safe_open(index.tensors[name].file, framework="pt") as file:
        stored = file.get_slice(name)[:1]
    return torch.equal(stored.to(value.dtype), value[:1].cpu())
