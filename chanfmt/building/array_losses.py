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
        if has_decoder(model) and DECODER_IDS not in example.arrays:
            raise UsageError(f"the embedding of {kind} needs {DECODER_IDS}, which its decoder reads", hint="add them")
        return ArrayEmbeddingLoss(model, example)
    with torch.no_grad(), explained("a sample"):
        logits = getattr(run_arrays(model, taken(model, example.arrays)), "logits", None)
    hint = "leave the labels out, or use --loss embedding"
    if logits is None or labels.shape[1:] != logits.shape[1:-1]:
        shape = "none" if logits is None else f"of shape {tuple(logits.shape[1:])}"
        raise UsageError(
            f"{kind} has not one row of logits for each label: a sample has labels of shape {labels.shape[1:]}, logits {shape}",
            hint=hint,
        )
    if IDS in example.arrays and labels.ndim > 1 and not has_decoder(model):
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
            logits = run_arrays(self.model, taken(self.model, batch.arrays)).logits
            return differentiated(nll(logits, batch.arrays[LABELS]))


class ArrayEmbeddingLoss:
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
        except REFUSALS as error:
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


def taken(model: Any, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What goes into the forward pass: labels only where a decoder reads them, one place later."""
    read = has_decoder(model) and DECODER_IDS not in arrays
    return {name: values for name, values in arrays.items() if name != LABELS or read}


def has_decoder(model: Any) -> bool:
    """Whether ``model`` has a decoder that runs; a classifier of an encoder-decoder's encoder has none."""
    return bool(model.config.is_encoder_decoder) and DECODER_IDS in array_names(model)
