"""Plan a build on arrays: whether the model takes them, which FFNs they reach, which loss it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError, UsageError, first_line
from chanfmt.building.array_losses import DECODER_IDS, REFUSALS, choose_array_loss, has_decoder, taken
from chanfmt.data.arrays import LABELS, CalibrationInputs, InputFile, draw_samples, placed
from chanfmt.models.find.discover import find_ffns_given
from chanfmt.models.run import TEST_TOKENS, array_names, explained, run_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.building.loss import Loss
    from chanfmt.data.source import Source
    from chanfmt.models.ffn import FFN


@dataclass(frozen=True)
class ArrayPlan:
    """What a build on a file of arrays measures.

    Attributes:
        ffns: The FFNs that the arrays reach, in model order.
        loss: The loss that is differentiated.
        source: The file, as the atlas records it.
        inputs: The samples drawn from the file.
    """

    ffns: list[FFN]
    loss: Loss
    source: Source
    inputs: CalibrationInputs


def plan_arrays(model: Any, file: InputFile, loss: str, sequences: int, seed: int) -> ArrayPlan:
    """Find the FFNs that the arrays of ``file`` reach in ``model``, choose the loss, and draw ``sequences`` samples.

    Args:
        loss: Name of the loss, as for `chanfmt.building.array_losses.choose_array_loss`.

    Raises:
        UsageError: ``model`` does not take these arrays, or does not have the loss.
        ModelError: ``model`` cannot run them, gives another output each time, or has no FFN that can be measured.
    """
    _check_names(model, file)
    run = taken(model, placed({name: values[:TEST_TOKENS] for name, values in file.arrays.items()}, model))
    _check_runs(model, {name: values[:1] for name, values in run.items()}, file)
    with explained(f"a sample of {file.name}"):
        ffns, rows = find_ffns_given(model, run)
    decoders = [seen for ffn, seen in zip(ffns, rows, strict=True) if ffn.place == "decoder"]
    source, inputs = draw_samples(file, sequences, seed, seq_len=max(decoders or rows), rows=max(rows))
    return ArrayPlan(ffns, choose_array_loss(model, inputs.batch(0, 1, model), loss, file.arrays.get(LABELS)), source, inputs)


def _check_names(model: Any, file: InputFile) -> None:
    """Raise `UsageError` if ``model`` does not take an array of ``file``, or if its main input or its decoder's is missing."""
    kind, known = type(model).__name__, array_names(model)
    unknown = [name for name in file.arrays if name not in known]
    if unknown:
        raise UsageError(
            f"{file.name}: {kind} does not take {unknown[0]}; it takes {', '.join(known)}",
            hint="name the arrays as the arguments of the model's forward",
        )
    if model.main_input_name not in file.arrays:
        raise UsageError(
            f"{file.name} has no {model.main_input_name}, which {kind} reads",
            hint="make the file with the model's own processor or tokenizer",
        )
    if has_decoder(model) and not {LABELS, DECODER_IDS} & file.arrays.keys():
        raise UsageError(
            f"{file.name} has neither {LABELS} nor {DECODER_IDS}, and the decoder of {kind} reads one of them",
            hint=f"add {LABELS}: the token ids that each sample should give",
        )


def _check_runs(model: Any, one: Mapping[str, torch.Tensor], file: InputFile) -> None:
    """Raise `ModelError` if ``model`` cannot run a sample, or gives another output each time."""
    try:
        with torch.no_grad():
            first, second = (run_arrays(model, one) for _ in range(2))
    except REFUSALS as error:
        shapes = ", ".join(f"{name} {tuple(values.shape[1:])}" for name, values in one.items())
        raise ModelError(
            f"{type(model).__name__} cannot run a sample of {file.name} ({shapes}): {first_line(error)}",
            hint="make the file with the model's own processor",
        ) from error
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and not _alike(value.float(), second[name].float()):
            raise ModelError(
                f"{type(model).__name__} gives another {name} each time, because it draws random numbers",
                hint=f"give the random numbers as an array too; the model takes {', '.join(array_names(model))}",
            )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same up to the order in which an accelerator adds."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)
