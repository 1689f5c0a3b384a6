"""Inputs for tiny models of images and sound: random arrays of the shapes that their configs ask for."""

from __future__ import annotations

from typing import Any

import numpy as np

from chanfmt.models.run import array_names

LABELS = 6
"""Tokens that a decoder should give."""
FRAMES = 64
WAVE = 4000

_FEATURES = {
    "speech_to_text": "input_feat_per_channel",
    "seamless_m4t": "feature_projection_input_dim",
    "seamless_m4t_v2": "feature_projection_input_dim",
    "wav2vec2-bert": "feature_projection_input_dim",
}
"""Where the configuration says how many features a frame has."""


def samples(model: Any, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """``count`` samples with labels for ``model``, float32 and int64."""
    generator = np.random.default_rng(seed)
    config = model.config
    arrays = {
        name: generator.integers(*values, size=(count, *shape))
        if values
        else generator.standard_normal((count, *shape)).astype(np.float32)
        for name, shape, values in _arrays(model)
    }
    if config.is_encoder_decoder and not type(model).__name__.endswith("Classification"):
        vocabulary = config.get_text_config(decoder=True).vocab_size
        return arrays | {"labels": generator.integers(3, vocabulary, (count, LABELS))}
    if "labels" not in array_names(model):
        return arrays
    return arrays | {"labels": generator.integers(0, config.num_labels, count)}


def _arrays(model: Any) -> list[tuple[str, tuple[int, ...], tuple[int, int] | None]]:
    """Name, shape of a sample, and the range of whole numbers; None for normally distributed numbers."""
    config, name = model.config, model.main_input_name
    vision = getattr(config, "vision_config", config)
    if config.model_type == "siglip2":
        side = int(vision.num_patches**0.5)
        return [
            (name, (side * side, vision.num_channels * vision.patch_size**2), None),
            ("pixel_attention_mask", (side * side,), (1, 2)),
            ("spatial_shapes", (2,), (side, side + 1)),
        ]
    if config.model_type == "imagegpt":
        return [(name, (32,), (0, config.vocab_size - 1))]
    if config.model_type == "perceiver":
        return [(name, (3, config.image_size, config.image_size), None)]
    if name == "pixel_values":
        size = getattr(vision, "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return [(name, (getattr(vision, "num_channels", 3), height, width), None)]
    if config.model_type == "whisper":
        return [(name, (config.num_mel_bins, 2 * config.max_source_positions), None)]
    if config.model_type == "audio-spectrogram-transformer":
        return [(name, (config.max_length, config.num_mel_bins), None)]
    if name == "input_features":
        field = _FEATURES.get(config.model_type)
        encoder = getattr(config, "encoder_config", config)
        return [(name, (FRAMES, getattr(config, field) if field else getattr(encoder, "num_mel_bins", 80)), None)]
    return [(name, (WAVE,), None)]
