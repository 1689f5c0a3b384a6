"""Plan a build on given arrays: whether the model takes them, what FFNs they reach, which loss they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError, UsageError, first_line
from chanfmt.building.loss import Loss, differentiated, explained, generator_of, hidden_state, nll, sampled
from chanfmt.data.arrays import IDS, LABELS, CalibrationInputs, InputFile, Samples, draw_samples, placed
from chanfmt.format import schema
from chanfmt.models.find.discover import find_ffns_given
from chanfmt.models.run import TEST_TOKENS, array_names, run_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from chanfmt.data.sources import Source
    from chanfmt.models.ffn import FFN

_DECODER_IDS = "decoder_input_ids"
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""What models raise over inputs that are not theirs."""


@dataclass(frozen=True)
class Given:
    """What a build on a file of inputs measures."""

    ffns: list[FFN]
    loss: Loss
    source: Source
    inputs: CalibrationInputs


def plan_given(model: Any, file: InputFile, loss: str, sequences: int, seed: int) -> Given:
    """Find what the arrays of ``file`` reach in ``model``, choose the loss called ``loss``, and draw ``sequences`` samples.

    Raises:
        UsageError: ``model`` does not take these arrays, or has no such loss.
        ModelError: It cannot run them, gives another output every time, or has no FFN that can be measured.
    """
    _check_names(model, file)
    run = _taken(model, placed({name: values[:TEST_TOKENS] for name, values in file.arrays.items()}, model))
    _check_runs(model, {name: values[:1] for name, values in run.items()}, file)
    with explained(f"a sample of {file.name}"):
        ffns, rows = find_ffns_given(model, run)
    decoders = [seen for ffn, seen in zip(ffns, rows, strict=True) if ffn.place == "decoder"]
    source, inputs = draw_samples(file, sequences, seed, seq_len=max(decoders or rows), rows=max(rows))
    return Given(ffns, choose_given_loss(model, inputs.batch(0, 1, model), loss, file.arrays.get(LABELS)), source, inputs)


def choose_given_loss(model: Any, example: Samples, name: str, labels: np.ndarray | None) -> Loss:
    """The loss called ``name``, `schema.LOSSES`' labels or embedding; ``auto`` is that of the labels where there are any.

    Args:
        example: One sample.
        labels: Of all samples that there are.

    Raises:
        UsageError: There is no such loss.
    """
    kind = type(model).__name__
    if name not in ("auto", "labels", "embedding"):
        raise UsageError(f"--loss {name} is of text; over given inputs there are labels and embedding")
    if name == "labels" and labels is None:
        raise UsageError("--loss labels needs an array of labels beside the inputs", hint="add it, or use --loss embedding")
    if labels is None or name == "embedding":
        if _has_decoder(model) and _DECODER_IDS not in example.arrays:
            raise UsageError(f"the embedding of {kind} needs {_DECODER_IDS}, which its decoder reads", hint="add them")
        return GivenEmbeddingLoss(model, example)
    with torch.no_grad(), explained("a sample"):
        logits = getattr(run_arrays(model, _taken(model, example.arrays)), "logits", None)
    hint = "leave the labels out, or use --loss embedding"
    if logits is None or labels.shape[1:] != logits.shape[1:-1]:
        shape = "none" if logits is None else f"of shape {tuple(logits.shape[1:])}"
        raise UsageError(
            f"{kind} has not one row of logits for each label: a sample has labels of shape {labels.shape[1:]}, logits {shape}",
            hint=hint,
        )
    if IDS in example.arrays and labels.ndim > 1 and not _has_decoder(model):
        raise UsageError(
            f"{kind} predicts the tokens that it reads: labels per token are no part of its inputs", hint=f"give {IDS} alone"
        )
    if labels.max() >= logits.shape[-1]:
        raise UsageError(f"the labels run to {labels.max()}, and {kind} tells {logits.shape[-1]} classes apart", hint=hint)
    return LabelsLoss(model, int(labels[0].size))


class LabelsLoss:
    """Sum of the NLL of given labels under the model's logits: of one class per sample, or of a decoder's tokens."""

    definition = schema.LOSSES["labels"]

    def __init__(self, model: Any, labels: int) -> None:
        """Args: ``labels`` is how many a sample has."""
        self.model = model
        self.labels = labels

    def terms(self, seq_len: int) -> int:
        return self.labels

    def backward(self, batch: Samples) -> float:
        with explained(f"{len(batch.sha256)} samples at a time"):
            logits = run_arrays(self.model, _taken(self.model, batch.arrays)).logits
            return differentiated(nll(logits, batch.arrays[LABELS]))


class GivenEmbeddingLoss:
    """`chanfmt.building.loss.EmbeddingLoss` over given arrays; the noise of a sample is drawn by its SHA-256."""

    definition = schema.LOSSES["embedding"]

    def __init__(self, model: Any, example: Samples) -> None:
        self.model = model
        try:
            with torch.no_grad():
                self.positions = self._hidden(example).shape[1]
        except ModelError as error:
            error.hint = "give labels for it"
            raise
        except _REFUSALS as error:
            raise ModelError(
                f"{type(model).__name__} cannot run a sample without its head: {first_line(error)}", hint="give labels for it"
            ) from error

    def terms(self, seq_len: int) -> int:
        return int(self.positions)

    def backward(self, batch: Samples) -> float:
        with explained(f"{len(batch.sha256)} samples at a time"):
            return sampled(self._hidden(batch), [generator_of(bytes.fromhex(digest)) for digest in batch.sha256])

    def _hidden(self, batch: Samples) -> torch.Tensor:
        arrays = {name: values for name, values in batch.arrays.items() if name != LABELS}
        return hidden_state(self.model, run_arrays(self.model.base_model, arrays), len(batch.sha256))


def _taken(model: Any, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What goes into the forward pass: labels only where a decoder reads them, one place later."""
    read = _has_decoder(model) and _DECODER_IDS not in arrays
    return {name: values for name, values in arrays.items() if name != LABELS or read}


def _has_decoder(model: Any) -> bool:
    """Whether ``model`` has a decoder that runs; a classifier of an encoder-decoder's encoder has none."""
    return bool(model.config.is_encoder_decoder) and _DECODER_IDS in array_names(model)


def _check_names(model: Any, file: InputFile) -> None:
    """Raise `UsageError` where ``model`` takes an array by none of the names, or lacks its main one."""
    kind, known = type(model).__name__, array_names(model)
    unknown = [name for name in file.arrays if name not in known]
    if unknown:
        raise UsageError(
            f"{file.name}: {kind} takes no {unknown[0]}; it takes {', '.join(known)}",
            hint="name the arrays as the model's forward does",
        )
    if model.main_input_name not in file.arrays:
        raise UsageError(
            f"{file.name} has no {model.main_input_name}, which {kind} reads",
            hint="make the file with the model's own processor or tokenizer",
        )
    if _has_decoder(model) and not {LABELS, _DECODER_IDS} & file.arrays.keys():
        raise UsageError(
            f"{file.name} has neither {LABELS} nor {_DECODER_IDS}, and the decoder of {kind} reads one of them",
            hint=f"add {LABELS}: the token ids that each sample should give",
        )


def _check_runs(model: Any, one: Mapping[str, torch.Tensor], file: InputFile) -> None:
    """Raise `ModelError` where ``model`` cannot run a sample, or draws at random what it makes of it."""
    try:
        with torch.no_grad():
            first, second = (run_arrays(model, one) for _ in range(2))
    except _REFUSALS as error:
        shapes = ", ".join(f"{name} {tuple(values.shape[1:])}" for name, values in one.items())
        raise ModelError(
            f"{type(model).__name__} cannot run a sample of {file.name} ({shapes}): {first_line(error)}",
            hint="make the file with the model's own processor",
        ) from error
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and not _alike(value.float(), second[name].float()):
            raise ModelError(
                f"{type(model).__name__} gives another {name} each time: it draws something at random",
                hint=f"give that too; it takes {', '.join(array_names(model))}",
            )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same up to the order in which an accelerator adds."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)
