"""Memory of the devices that hold a model: their peak as torch counts it, and what is free. A CPU's peak is the resident set."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.memory import known_memory

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


def free_memory(device: torch.device, processes: int = 1) -> int | None:
    """Bytes that this process can still allocate on ``device``; None if the device or the system does not say.

    For a CPU these are the bytes that the system can give without swapping, or fewer if a limit of the process or of its
    control group (a container, a Slurm job) is lower.

    Args:
        processes: Processes of this machine that share the memory of the CPU.
    """
    import torch

    if device.type == "cpu":
        return _free_on_host(processes)
    module = torch.get_device_module(device)
    if device.type == "mps":
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    try:
        free, _ = module.mem_get_info(device)
        # What torch keeps for later is free for the pass.
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def _free_on_host(processes: int) -> int | None:
    known = known_memory()
    left = [*([] if known is None else [known // processes]), *_own_limits()]
    return max(0, min(left)) if left else None


def _own_limits() -> Iterator[int]:
    """Bytes that are left under each limit that only this process has."""
    if sys.platform != "linux":
        return
    import resource

    status = _text(Path("/proc/self/status"))
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        used = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        if soft != resource.RLIM_INFINITY and used:
            yield soft - int(used[1]) * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _counting(model: Any) -> Iterator[tuple[Any, torch.device]]:
    """The devices of ``model`` whose memory torch counts, each with torch's module for its type."""
    import torch

    for device in {parameter.device for parameter in model.parameters()}:
        module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        if hasattr(module, "max_memory_allocated"):
            yield module, device
