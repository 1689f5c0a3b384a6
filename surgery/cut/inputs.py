"""Inputs on which a model is compared with its cut: text if it reads tokens, otherwise noise of the right shape."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import CheckError
from chanfmt.models.find.discover import find_ffns, find_ffns_given
from chanfmt.models.run import run_arrays, run_text, vocabulary
from surgery.planning.plan import CHECK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.models.ffn import FFN

_SAMPLES = 4
_SOUND_SAMPLES = 16_000


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model's ``forward``, and their description.

    Attributes:
        arrays: Argument name to array; the first axis is samples.
        count: Number of tokens, or of samples for other inputs.
        text: Description of the inputs, for people.
    """

    arrays: dict[str, torch.Tensor]
    count: int
    text: str

    def run(self, model: Any) -> Any:
        """One forward pass."""
        if "input_ids" in self.arrays:
            return run_text(model, self.arrays["input_ids"])
        dtype = next(model.parameters()).dtype
        return run_arrays(
            model, {name: values.to(dtype) if values.is_floating_point() else values for name, values in self.arrays.items()}
        )

    def find_ffns(self, model: Any) -> Sequence[FFN]:
        """The FFNs of ``model`` that these inputs reach, in model order. Raises `ModelError`."""
        if "input_ids" in self.arrays:
            return find_ffns(model)
        return find_ffns_given(model, self.arrays)[0]


def check_inputs(model: Any, tokens: Sequence[int], seed: int) -> Inputs:
    """Inputs for ``model``: ``tokens`` if they fit the model, otherwise random inputs.

    Raises:
        CheckError: The model reads a kind of input of which this module does not know the shape.
    """
    # A plan's seed is any integer; torch takes 64 bits.
    generator = torch.Generator().manual_seed(seed % 2**63)
    forward = inspect.signature(model.forward).parameters
    if "input_ids" in forward:
        return _tokens(model, tokens, generator)
    name = model.main_input_name
    shape = _shape(model, name)
    if shape is None:
        raise CheckError(
            f"{type(model).__name__} reads {name}, and the shape of {name} is unknown, so its logits cannot be compared",
            hint="to cut this model anyway, add --no-verify, and evaluate the result",
        )
    arrays = {name: torch.randn(_SAMPLES, *shape, generator=generator)}
    if "decoder_input_ids" in forward:
        arrays["decoder_input_ids"] = torch.randint(vocabulary(model), (_SAMPLES, 8), generator=generator)
    return Inputs(arrays, _SAMPLES, f"random {name}")


def _tokens(model: Any, tokens: Sequence[int], generator: torch.Generator) -> Inputs:
    known = vocabulary(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    count = min(CHECK_TOKENS, positions or CHECK_TOKENS)
    stored = tokens[:count]
    if stored and min(stored) >= 0 and max(stored) < known:
        return Inputs({"input_ids": torch.tensor([stored])}, len(stored), "calibration tokens")
    ids = torch.randint(known, (1, count), generator=generator)
    return Inputs({"input_ids": ids}, count, "random tokens")


def _shape(model: Any, name: str) -> tuple[int, ...] | None:
    """Shape of one sample of the input ``name``; None if it is unknown."""
    config = getattr(model.config, "vision_config", model.config)
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return (getattr(config, "num_channels", 3), height, width)
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_values" and not hasattr(config, "num_mel_bins"):
        return (_SOUND_SAMPLES,)
    return None
