"""Load a model for measuring: frozen and in evaluation mode. A model that cannot be measured is refused."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from chanfmt.base.choices import unknown
from chanfmt.base.errors import MissingPackageError, ModelError, UsageError, first_line
from chanfmt.base.narrate import say
from chanfmt.models.accounting import check_accounted
from chanfmt.models.classes import auto_class
from chanfmt.models.loadable import loadable
from chanfmt.models.out_of_memory import is_out_of_memory
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.room import check_room

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from chanfmt.models.source import ModelSource

_LONG_TO_LOAD = 100_000_000
"""Bytes of a checkpoint that takes so long to load that the user should know why nothing moves."""
DEVICE_MAPS = ("auto",)
HALF = ("bfloat16", "float16")
DTYPES = ("auto", "float32", *HALF, "float64")


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: str = "auto", device_map: str | None = None
) -> PreTrainedModel:
    """Load the model that the config of ``source`` names: on its device, in evaluation mode, with every parameter frozen.

    A model that cannot fit is refused before a weight is read. With accelerate, weights go from the files to their device, a few
    tensors at a time; without it, the whole model is in the memory of the CPU first.

    A model that is in memory already (``source.loaded``) is returned as it is.

    Args:
        dtype: One of `DTYPES`; ``auto`` is float32 on a CPU and the checkpoint's own dtype on other devices.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        device_map: ``auto`` spreads the model over all GPUs; None uses ``device``.

    Raises:
        NoRoomError: The weights are larger than the memory that is free.
        ModelError: transformers cannot load the model, a tensor of its files would be ignored, weights are missing or not
            finite, or memory runs out.
        MissingPackageError: ``device_map`` is given and accelerate is not installed.
        UsageError: The model is in memory already, in another dtype or on another device than asked for.
    """
    if source.loaded is not None:
        return _as_it_is(source.loaded, dtype=dtype, device=device, device_map=device_map)
    place = pick_device(device)
    wanted = pick_dtype(dtype, place)
    check_device_map(device_map, device)
    extra: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    check_accounted(source)
    check_room(source, wanted, place, spread=device_map is not None)
    if device_map is None and place.type != "cpu" and importlib.util.find_spec("accelerate") is not None:
        extra = {"device_map": {"": place}}
    size = source.index.nbytes
    if size >= _LONG_TO_LOAD:
        say(f"loading {source.id}: {size / 1e9:,.2f} GB on {'all GPUs' if device_map else place}")
    try:
        with quiet_transformers(), loadable(source.index) as directory:
            model, info = auto_class(source.config).from_pretrained(
                directory,
                config=source.config,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                **extra,
            )
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise _too_large(source, place) from None
        raise ModelError(f"{source.id}: transformers cannot load it: {first_line(error)}") from None
    model.config.name_or_path = str(source.directory)
    _check_as_accounted(info, source.id)
    if device_map:
        _check_all_loaded(model, source.id, place)
    try:
        # A model that went straight to its devices stays there.
        model = model if extra else model.to(place)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _too_large(source, place) from None
        raise
    model.eval()
    model.requires_grad_(False)
    check_finite(model)
    return model


def check_device_map(device_map: str | None, device: str) -> None:
    """Check a request to spread a model over devices.

    Raises:
        UsageError: ``device_map`` is neither None nor ``auto``, or ``device`` names a device too.
        MissingPackageError: accelerate is not installed.
    """
    if device_map is None:
        return
    if device_map not in DEVICE_MAPS:
        raise unknown("device map", device_map, DEVICE_MAPS)
    if device != "auto":
        raise UsageError("--device-map chooses the devices itself", hint="leave out --device")
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackageError("accelerate", "multi-gpu", "--device-map")


def pick_device(device: str, flag: str = "--device") -> torch.device:
    """The device called ``device``; for ``auto``, the first GPU, or the CPU if there is none.

    Args:
        flag: The option that names the device, for the error.

    Raises:
        ModelError: There is no such device, or it cannot be used.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = (
            "for a GPU, write cuda or cuda:1" if device.lower().startswith(("gpu", "nvidia")) else "use auto, cpu, cuda or cuda:1"
        )
        raise ModelError(f"{flag} {device!r} cannot be used: {first_line(error)}", hint=hint) from None
    return place


def pick_dtype(dtype: str, place: torch.device) -> Any:
    """One of `DTYPES` as transformers takes it: a torch dtype, or ``auto`` for the checkpoint's own. Raises `UsageError`."""
    import torch

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else dtype
    return getattr(torch, dtype)


def check_finite(model: nn.Module, under: str = "") -> None:
    """Raise `ModelError` if a parameter holds NaN or infinity. The error names it; ``under`` is the name of ``model``."""
    import torch

    for name, parameter in model.named_parameters(prefix=under):
        # NaN shows in the extremes too. A mask of all values would take memory of its own.
        if parameter.numel() and not bool(torch.isfinite(torch.stack(parameter.aminmax())).all()):
            raise ModelError(
                f"the weight {name} holds NaN or infinite values", hint="download the checkpoint again, or repair it"
            )


def _too_large(source: ModelSource, place: torch.device) -> ModelError:
    return ModelError(
        f"{source.id} does not fit on {place}",
        hint="use --dtype bfloat16, --device cpu, or a larger GPU; atlas build also has --stream",
    )


def _check_as_accounted(info: Mapping[str, Any], name: str) -> None:
    """Raise `ModelError` if transformers lacked a weight that the accounting of the checkpoint found."""
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        for item in sorted(info[kind], key=str):
            tensor = item if isinstance(item, str) else item[0]
            raise ModelError(
                f"{name}: transformers does not load {tensor}, although the checkpoint seems to hold it",
                hint="a model with random weights cannot be measured; is this the complete checkpoint?",
            )


def _as_it_is(model: PreTrainedModel, *, dtype: str, device: str, device_map: str | None) -> PreTrainedModel:
    """``model``, which is in memory. Raises `UsageError` if it would have to be changed for the request."""
    parameter = next(model.parameters())
    found = str(parameter.dtype).removeprefix("torch.")
    if dtype not in ("auto", found):
        raise UsageError(
            f"--dtype {dtype} cannot be used with a model that is in memory in {found}",
            hint=f"leave it out, or convert the model first: model.to(torch.{dtype})",
        )
    if device != "auto" and pick_device(device).type != parameter.device.type:
        raise UsageError(
            f"--device {device} cannot be used with a model that is in memory on {parameter.device}",
            hint=f"leave it out, or move the model first: model.to({device!r})",
        )
    if device_map is not None:
        raise UsageError("--device-map cannot be used with a model that is in memory", hint="leave it out")
    return model


def _check_all_loaded(model: PreTrainedModel, name: str, place: torch.device) -> None:
    """Raise `ModelError` if accelerate left weights outside the devices that run them."""
    left = sorted({str(where) for where in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"})
    if left and (place.type != "cpu" or "disk" in left):
        raise ModelError(
            f"{name} does not fit on the available devices: accelerate would leave weights on {' and '.join(left)}",
            hint="use --dtype bfloat16, or more GPUs; atlas build also has --stream",
        )
