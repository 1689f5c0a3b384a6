"""The losses of a build on arrays: given labels, or the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError, UsageError, first_line
from chanfmt.building.loss import generator_of, hidden_state, sampled
from chanfmt.data.arrays import IDS, LABELS
from chanfmt.format import schema
from chanfmt.models.likelihood import differentiated, nll
from chanfmt.models.run import array_names, explained, run_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from chanfmt.building.loss import Loss
    from chanfmt.data.arrays import Samples

DECODER_IDS = "decoder_input_ids"
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""The exceptions that models raise over arrays that they cannot take."""


def choose_array_loss(model: Any, example: Samples, name: str, labels: np.ndarray | None) -> Loss:
    """The loss called ``name``: ``labels`` or ``embedding``; for ``auto``, ``labels`` if there are labels.

    Args:
        example: One sample.
        labels: The labels of all samples in the file (sample, ...); None if the file has none.

    Raises:
        UsageError: The model does not have this loss, or the labels do not fit its logits.
    """
    kind = type(model).__name__
    if name not in ("auto", "labels", "embedding"):
        raise UsageError(f"--loss {name} needs text; a file of inputs can be measured with --loss labels or --loss embedding")
    if name == "labels" and labels is None:
        raise UsageError(
            "--loss labels needs an array of labels beside the inputs", hint="add the array, or use --loss embedding"
        )
    if labels is None or name == "embedding":
        if has_decoder(model) and DECODER_IDS not in example.arrays:
            raise UsageError(
                f"the embedding of {kind} needs {DECODER_IDS}, which its decoder reads", hint=f"add an array {DECODER_IDS}"
            )
        return ArrayEmbeddingLoss(model, example)
    with torch.no_grad(), explained("a sample"):
        logits = getattr(run_arrays(model, taken(model, example.arrays)), "logits", None)
    hint = "leave the labels out, or use --loss embedding"
    if logits is None or labels.shape[1:] != logits.shape[1:-1]:
        shape = "none" if logits is None else f"of shape {tuple(logits.shape[1:])}"
        raise UsageError(
            f"{kind} does not give one row of logits for each label: a sample has labels of shape {labels.shape[1:]} and logits {shape}",
            hint=hint,
        )
    if IDS in example.arrays and labels.ndim > 1 and not has_decoder(model):
        raise UsageError(
            f"{kind} predicts the tokens that it reads, so it does not take a label per token", hint=f"give {IDS} alone"
        )
    if labels.max() >= logits.shape[-1]:
        raise UsageError(f"the labels run to {labels.max()}, but {kind} has {logits.shape[-1]} classes", hint=hint)
    return LabelsLoss(model, int(labels[0].size))


class LabelsLoss:
    """Sum of the NLL of given labels under the model's logits: one class per sample, or the tokens of a decoder."""

    definition = schema.LOSSES["labels"]

    def __init__(self, model: Any, labels: int) -> None:
        """Take ``labels``, the number of labels of a sample."""
        self.model = model
        self.labels = labels

    def terms(self, seq_len: int) -> int:
        return self.labels

    def backward(self, batch: Samples) -> float:
        with explained(f"{len(batch.sha256)} samples at a time"):
            logits = run_arrays(self.model, taken(self.model, batch.arrays)).logits
            return differentiated(nll(logits, batch.arrays[LABELS]))


class ArrayEmbeddingLoss:
    """The embedding loss (`chanfmt.building.loss.EmbeddingLoss`) over arrays. The noise is drawn by the sample's SHA-256."""

    definition = schema.LOSSES["embedding"]

    def __init__(self, model: Any, example: Samples) -> None:
        self.model = model
        try:
            with torch.no_grad():
                self.positions = self._hidden(example).shape[1]
        except ModelError as error:
            error.hint = "give labels for this model"
            raise
        except REFUSALS as error:
            raise ModelError(
                f"{type(model).__name__} cannot run a sample without its head: {first_line(error)}",
                hint="give labels for this model",
            ) from error

    def terms(self, seq_len: int) -> int:
        return int(self.positions)

    def backward(self, batch: Samples) -> float:
        with explained(f"{len(batch.sha256)} samples at a time"):
            return sampled(self._hidden(batch), [generator_of(bytes.fromhex(digest)) for digest in batch.sha256])

    def _hidden(self, batch: Samples) -> torch.Tensor:
        arrays = {name: values for name, values in batch.arrays.items() if name != LABELS}
        return hidden_state(self.model, run_arrays(self.model.base_model, arrays), len(batch.sha256))


def taken(model: Any, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays that go into the forward pass. Labels are among them only if a decoder reads them, one position later."""
    read = has_decoder(model) and DECODER_IDS not in arrays
    return {name: values for name, values in arrays.items() if name != LABELS or read}


def has_decoder(model: Any) -> bool:
    """Whether ``model`` has a decoder that runs. A classifier on the encoder of an encoder-decoder has none."""
    return bool(model.config.is_encoder_decoder) and DECODER_IDS in array_names(model)
