"""Peak memory of the devices that hold a model, as torch counts it. A CPU is not such a device: see the resident set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def restart_device_peaks(model: Any) -> None:
    """Let the peaks of `device_peak` begin with what is allocated now."""
    for module, device in _counting(model):
        module.reset_peak_memory_stats(device)


def device_peak(model: Any) -> int | None:
    """Most bytes that torch had allocated on one of the devices of ``model``; None if the model lies on the CPU."""
    return max((int(module.max_memory_allocated(device)) for module, device in _counting(model)), default=None)


def _counting(model: Any) -> Iterator[tuple[Any, torch.device]]:
    """The devices of ``model`` whose memory torch counts, each with torch's module for its type."""
    import torch

    for device in {parameter.device for parameter in model.parameters()}:
        module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        if hasattr(module, "max_memory_allocated"):
            yield module, device
