"""A model without its weights, and its weights from the checkpoint files, read when they are needed.

transformers converts a checkpoint when it loads it: renames, joins experts, concatenates, transposes. The same code of
transformers runs here on a part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.accounting import places
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.stored.tensors import DTYPES, read_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.safetensors import TensorEntry
    from chanfmt.models.source import ModelSource

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_USUAL_TRIM = 128 << 10
_KEPT = 64 << 20
"""Bytes of free memory that glibc may keep while a block computes."""
_LARGE = 1 << 20
"""Bytes. Larger pieces of memory are taken from the system and given back one by one."""
_LARGEST_REUSED = 32 << 20
"""Bytes. glibc raises the threshold up to this size by itself, until a program sets it."""


def weightless(loader: Any, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Build the model of ``config``: in evaluation mode, frozen, parameters on the meta device, buffers with values.

    Args:
        loader: An Auto class, or the model's own class.

    Raises:
        ModelError: transformers cannot build the model.
    """
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A parameter that is on the meta device already is being tied, and stays the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), False)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        with quiet_transformers():
            if hasattr(loader, "from_config"):
                model = loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            else:
                model = loader._from_config(config, dtype=dtype)
    except Exception as error:
        raise ModelError(f"transformers cannot build {config.model_type}: {first_line(error)}") from None
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    return model.eval().requires_grad_(False)


def return_freed_memory() -> None:
    """Make the C library return freed weights to the system at once, if it is glibc.

    glibc keeps freed pieces of up to 32 MiB, and cannot use them for the next tensor of that size, which must be aligned.
    So the blocks of a streamed model would pile up in memory.
    """
    _set_threshold(_LARGE)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Do as `return_freed_memory` in the body. Afterwards, glibc reuses freed pieces of up to 32 MiB, which is faster."""
    _set_threshold(_LARGE)
    try:
        yield
    finally:
        _set_threshold(_LARGEST_REUSED)


@contextlib.contextmanager
def freed_memory_reused() -> Iterator[None]:
    """Let glibc reuse freed pieces of up to 32 MiB in the body, which computes. Afterwards, all is as `return_freed_memory` wants it.

    Taking a tensor's memory from the system anew costs a quarter of the time of the product that fills it.
    """
    _set_threshold(_LARGEST_REUSED)
    _set_trim(_KEPT)
    try:
        yield
    finally:
        _set_threshold(_LARGE)
        _set_trim(_USUAL_TRIM)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set_trim(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, size)


def _set_threshold(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that transformers takes for ``dtype="auto"``: the config's, or else that of the first floating tensor."""
    if isinstance(source.config.dtype, torch.dtype):
        return source.config.dtype
    kinds = (DTYPES.get(entry.dtype) for entry in source.index.tensors.values())
    return next((dtype for dtype in kinds if dtype is not None and dtype.is_floating_point), torch.float32)


class StoredParameters:
    """Gives a `weightless` model the weights that ``from_pretrained`` would give it, some at a time.

    Args:
        model: The model, its parameters on the meta device.
        source: The model's files.
        dtype: Dtype of the model.
    """

    def __init__(self, model: Any, source: ModelSource, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model = model
        self._index = source.index
        self._dtype = dtype
        self._name = source.id
        self._mapping = get_model_conversion_mapping(model)
        self._sources = self._targets()
        # transformers reverts the conversion of a name by this list, which `from_pretrained` leaves on the model.
        model._weight_conversions = [conversion for conversion in self._mapping if conversion.was_used()]

    def _targets(self) -> dict[str, list[str]]:
        """Name in the model to stored tensors. A stored tensor that becomes several in the model is listed under one of them."""
        targets: dict[str, list[str]] = defaultdict(list)
        for stored, place in places(self._model, self._mapping, self._index.tensors).items():
            targets[place.target].append(stored)
        return dict(targets)

    @property
    def missing(self) -> set[str]:
        """Names in the model that no stored tensor is listed under."""
        return self._model.state_dict().keys() - self._sources.keys()

    @property
    def unexpected(self) -> set[str]:
        """Names of stored tensors, as the model would call them, that the model has no place for."""
        return self._sources.keys() - self._model.state_dict().keys()

    def load(self, names: set[str], device: torch.device) -> None:
        """Load the parameters and buffers ``names`` of the model onto ``device``.

        Raises:
            ModelError: A shard cannot be read, or a weight is missing or has another shape in the checkpoint.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted = {
            stored: _Reader(self._index.tensors[stored])
            for target, sources in self._sources.items()
            if target in names
            for stored in sources
        }
        conversions = self._model._weight_conversions
        with quiet_transformers():
            convert_and_load_state_dict_in_model(
                self._model,
                wanted,
                LoadStateDictConfig(
                    dtype=self._dtype,
                    dtype_plan=self._model._get_dtype_plan(self._dtype),
                    weight_mapping=self._mapping,
                    device_map={"": device},
                ),
            )
        self._model._weight_conversions = conversions
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parameter = self._model.get_submodule(owner)._parameters.get(leaf)
            if parameter is not None:
                parameter.requires_grad_(False)

    def check_loaded(self, names: set[str]) -> None:
        """Raise `ModelError` if a parameter in ``names`` still has no values."""
        state = self._model.state_dict()
        lacking = sorted(name for name in names if state[name].is_meta)
        if lacking:
            raise ModelError(
                f"{self._name}: the checkpoint lacks {len(lacking)} weights, {lacking[0]} among them, "
                "or has them in another shape",
                hint="a model with random weights cannot be measured; is this the complete checkpoint?",
            )


class _Reader:
    """One stored tensor. transformers indexes it with an ellipsis when it wants the values; they are read then."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry

    def __getitem__(self, index: Any) -> torch.Tensor:
        return read_tensor(self._entry)


@contextlib.contextmanager
def restored(modules: nn.Module) -> Iterator[None]:
    """Put the parameters that ``modules`` has now back at the end of the body."""
    before = [(module, dict(module._parameters)) for module in modules.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)
