"""One run of the command on a build: how long it takes, on what it runs, and what the runs before it left."""

from __future__ import annotations

import datetime
import platform
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.command_line import recorded_command
from chanfmt.base.processes import processes
from chanfmt.base.version import __version__
from chanfmt.format.records import DEVICE_PEAK, MEMORY_PREDICTION, ProducerRecord
from chanfmt.models.device_memory import device_peak, restart_device_peaks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.building.state import PartialAtlas


@dataclass(frozen=True)
class Session:
    """One run of the command. A build that is interrupted and continued takes several.

    Attributes:
        started: When this run started, seconds of the monotonic clock.
        before: What the runs before this one recorded; None in the first run.
        history: What was predicted of the memory, and one entry for each time the build was continued, this run included.
    """

    started: float
    before: ProducerRecord | None = None
    history: tuple[Mapping[str, Any], ...] = ()


def begin_session(partial: PartialAtlas | None, model: Any, prediction: Mapping[str, object] | None = None) -> Session:
    """Start the clock of this run on ``model``, which continues ``partial`` unless that is None.

    Args:
        prediction: What the atlas records of the predicted memory, if this run made a prediction.
    """
    restart_device_peaks(model)
    if partial is None:
        return Session(time.monotonic(), history=({MEMORY_PREDICTION: prediction},) if prediction else ())
    line = {
        "command": recorded_command(),
        "resumed_at_sequence": partial.state.sequences,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Session(time.monotonic(), partial.producer, (*partial.producer.history, line))


def producer_record(session: Session, model: Any) -> ProducerRecord:
    """What the atlas records of the runs up to now: versions, command, hardware, seconds, peak memory in bytes.

    The peak is that of the process, on the host. If the model is on a GPU, a line of the history has the GPU's peak: the most
    that torch had allocated on one GPU of this process, after the model was loaded.
    """
    seconds = time.monotonic() - session.started
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    command = recorded_command()
    if session.before is not None:
        seconds += session.before.seconds
        peak = max(peak, session.before.peak_memory_bytes)
        command = session.before.command
    history = [line for line in session.history if DEVICE_PEAK not in line]
    before = None if session.before is None else session.before.device_peak_memory_bytes
    peaks = [peak for peak in (before, device_peak(model)) if peak is not None]
    if peaks:
        history.append({DEVICE_PEAK: max(peaks)})
    return ProducerRecord(_versions(), command, _hardware(model), seconds, peak, tuple(history))


def environment_of(model: Any) -> dict[str, Any]:
    """Everything around a build that may change the last bits of a sum: values of `chanfmt.building.state.ENVIRONMENT`."""
    versions = _versions()
    return {name: versions[name] for name in ("chanfmt", "torch", "transformers")} | {
        "threads": torch.get_num_threads(),
        "hardware": _hardware(model),
    }


def _versions() -> dict[str, str]:
    import h5py
    import transformers

    return {
        "chanfmt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "h5py": h5py.__version__,
        "numpy": np.__version__,
    }


def _hardware(model: Any) -> str:
    """Kind and number of the devices that hold ``model``, in all processes."""
    devices = {parameter.device for parameter in model.parameters()}
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    count = len(devices) * processes()
    return f"{count} x {name}" if count > 1 else name
