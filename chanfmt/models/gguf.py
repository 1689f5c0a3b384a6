"""GGUF files as ordinary checkpoints: dequantised once into the user's cache.

If a change here gives other weights, another config or another tokenizer, raise `chanfmt.models.gguf_cache.CONVERSION`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from chanfmt.algebra.gguf_names import gguf_package
from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.gguf_cache import cached
from chanfmt.models.gguf_header import read_header
from chanfmt.models.gguf_rotation import stored_scaling
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.rotary_fields import head_size, older_fields, rotation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def dequantized_directory(path: Path) -> Path:
    """The directory of a float32 safetensors checkpoint of the GGUF file ``path``. It is made on first use.

    Raises:
        ModelError: transformers cannot read the file.
        MissingPackageError: The ``gguf`` package is not installed.
        ChanfmtError: The cache cannot be written, or the disk is full.
    """
    return cached(path, _convert)


def load_gguf(path: Path) -> Any:
    """The model of the GGUF file ``path``, with dense float32 weights.

    Stock transformers loads it. Where the file scales positions and transformers does not read that, the config says it.

    Raises:
        ModelError: transformers cannot read the file, or positions are scaled in a way that is not known.
        MissingPackageError: The ``gguf`` package is not installed.
    """
    gguf_package("reading a GGUF file")
    import torch
    import transformers

    extra = {}
    if hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet(path):
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    _scale_positions(config, path)
    with _quiet(path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, **extra
        )


def _scale_positions(config: Any, path: Path) -> None:
    """Put into ``config`` how the GGUF file ``path`` scales positions."""
    text = config.get_text_config()
    own = rotation(text)
    if own and (scaling := stored_scaling(path, read_header(path), float(own["rope_theta"]), head_size(text))):
        own |= scaling


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Turn what transformers raises over ``path`` in the body into `ModelError`, and keep its output off the terminal."""
    try:
        # transformers draws its progress bar even if stderr is a file.
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet_transformers(), quiet:
            yield
    except Exception as error:
        raise ModelError(f"transformers cannot read {path}: {first_line(error)}") from error


def _convert(path: Path, directory: Path) -> None:
    model = load_gguf(path)
    import transformers

    with _quiet(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The weights are dense now; with its quantiser still in place, transformers would refuse to save the model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    file = directory / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(older_fields(fields.get("rope_parameters")) | fields, indent=2) + "\n", encoding="utf-8")
