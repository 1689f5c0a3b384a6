"""GGUF files as ordinary checkpoints: dequantised once into the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from typing import TYPE_CHECKING

import platformdirs

from chanfmt.base.errors import ChanfmtError, MissingPackageError, ModelError, first_line
from chanfmt.base.files import atomic_directory, check_space
from chanfmt.base.narrate import say
from chanfmt.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from pathlib import Path


def dequantized_directory(path: Path) -> Path:
    """The directory of a float32 safetensors checkpoint of the GGUF file ``path``. It is made on first use.

    Raises:
        ModelError: transformers cannot read the file.
        MissingPackageError: The ``gguf`` package is not installed.
    """
    target = _cache() / f"{path.stem}-{_sha256(path)[:16]}"
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ChanfmtError(
                f"cannot make {target.parent} for the dequantised model: {error.strerror}", hint="set XDG_CACHE_HOME"
            ) from None
        # A value takes at least half a byte in the file, and four bytes in the checkpoint.
        check_space(target.parent, 8 * path.stat().st_size)
        say(f"dequantising {path.name} to {target} (once)")
        _convert(path, target)
    return target


def _convert(path: Path, target: Path) -> None:
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
    with quiet_transformers(), atomic_directory(target, overwrite=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _cache() -> Path:
    return platformdirs.user_cache_path("chanfmt", appauthor=False) / "gguf"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
