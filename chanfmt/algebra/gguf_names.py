"""llama.cpp's names of tensors and architectures, by the tables of the ``gguf`` package."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "cohere": "command-r",
    "phi": "phi2",
}
"""Model types whose architecture has another name in llama.cpp."""
_EXPERT = re.compile(r"(\.experts)\.\d+(?=\.)")
SUFFIXES = (".weight", ".bias")


def gguf_package(purpose: str) -> Any:
    """The package ``gguf``. Raises `MissingPackageError` if it is not installed; ``purpose`` says what needs it."""
    try:
        import gguf
    except ImportError:
        raise MissingPackageError("gguf", "gguf", purpose) from None
    return gguf


def tensor_names(architecture: str, layers: int, purpose: str) -> Any:
    """The table of the names of an architecture's tensors; None if llama.cpp does not know the architecture.

    Args:
        architecture: The name of an architecture in llama.cpp, or a model type of transformers.
        layers: Number of layers.
        purpose: What needs the package, for the error.

    Raises:
        MissingPackageError: The package gguf is not installed.
    """
    gguf = gguf_package(purpose)
    plain = _plain(_ARCHITECTURES.get(architecture, architecture).removesuffix("_text"))
    found = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if _plain(name) == plain), None)
    return None if found is None else gguf.TensorNameMap(found, layers)


def tensor_name(names: Any, tensor: str) -> str | None:
    """llama.cpp's name of the checkpoint's ``tensor``, with its suffix; None if there is none.

    All experts of a layer are one tensor in llama.cpp, so the number of the expert does not matter.
    """
    found = names.get_name(_EXPERT.sub(r"\1", tensor), try_suffixes=SUFFIXES)
    return None if found is None else str(found)


def down_projection(names: Any, tensors: Iterable[str]) -> str | None:
    """llama.cpp's name of the weight of a down projection that the checkpoint holds as ``tensors``; None if there is none."""
    found = {weight_name(names, tensor) for tensor in tensors}
    return found.pop() if len(found) == 1 else None


def weight_name(names: Any, tensor: str) -> str | None:
    """llama.cpp's name of the checkpoint's weight ``tensor``, which ends in ``.weight``; None if there is none."""
    name = tensor_name(names, tensor)
    # A fused tensor of experts has no suffix in the checkpoint.
    return name if name is None or name.endswith(".weight") else f"{name}.weight"


def text_type(config: Mapping[str, Any]) -> str:
    """The model type in a ``config.json``; that of the text model, if the model has several."""
    text = config.get("text_config")
    return str((text if isinstance(text, dict) else config).get("model_type") or config.get("model_type") or "")


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")
