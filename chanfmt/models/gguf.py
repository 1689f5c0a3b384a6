"""GGUF files as ordinary checkpoints: dequantised once into the user's cache.

If a change here gives other weights, another config or another tokenizer, raise `chanfmt.models.gguf_cache.CONVERSION`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING

from chanfmt.base.errors import MissingPackageError, ModelError, first_line
from chanfmt.models.gguf_cache import cached
from chanfmt.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from pathlib import Path


def dequantized_directory(path: Path) -> Path:
    """The directory of a float32 safetensors checkpoint of the GGUF file ``path``. It is made on first use.

    Raises:
        ModelError: transformers cannot read the file.
        MissingPackageError: The ``gguf`` package is not installed.
        ChanfmtError: The cache cannot be written, or the disk is full.
    """
    return cached(path, _convert)


def _convert(path: Path, directory: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingPackageError("gguf", "gguf", "reading a GGUF file") from None
    import torch
    import transformers

    extra = {}
    if hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # transformers draws its progress bar even if stderr is a file.
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet_transformers(), quiet:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, **extra
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ModelError(f"transformers cannot read {path}: {first_line(error)}") from error
    # The weights are dense now; with its quantiser still in place, transformers would refuse to save the model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
