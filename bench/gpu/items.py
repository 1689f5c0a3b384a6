"""What every step of the bench needs: results as JSON lines, commands run in this process, seconds and peak memory.

A step prints one line for each item. An item that fails is recorded with its error, and the next item runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = "item: "
"""Beginning of the lines of stdout that hold an item. Other lines are what a library says."""
DEVICE = os.environ.get("DEVICE", "cuda")
TINY = os.environ.get("SCALE", "full") == "tiny"
CUDA = DEVICE.startswith("cuda")
WORK = Path(os.environ.get("BENCH_WORK", "."))
"""Directory of the checkpoints and atlases that the steps make."""
warnings.simplefilter("ignore")


def item(name: str, measure: Callable[[], dict[str, Any] | None], *, most: dict[str, float] | None = None) -> bool:
    """Run ``measure`` and print what it found. Returns whether that is as it should be.

    Args:
        measure: Returns values by name. An item is not in order if there is a value ``code`` other than 0, or ``same`` that is
            not true.
        most: Largest value allowed, by name.
    """
    began = time.perf_counter()
    try:
        found = measure() or {}
        over = {key: limit for key, limit in (most or {}).items() if not found.get(key, float("inf")) <= limit}
        good = not over and found.get("code", 0) == 0 and found.get("same", True) is True
        line = {"name": name, "ok": good, "seconds": round(time.perf_counter() - began, 2), **found}
        if over:
            line["allowed"] = over
    except Exception as error:
        good = False
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-6:]
        said = f"{type(error).__name__}: {str(error)[:400]}"
        line = {"name": name, "ok": False, "seconds": round(time.perf_counter() - began, 2), "error": said, "at": places}
    print(MARK + json.dumps(line, default=str), flush=True)
    return good


def run(program: str, *arguments: object) -> dict[str, Any]:
    """Run ``atlas`` or ``surgery`` in this process. Returns its exit code and, if that is not 0, what it said last."""
    from chanfmt.cli.main import main as atlas
    from surgery.cli.main import main as surgery

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code: Any = {"atlas": atlas, "surgery": surgery}[program]([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            code = 130
    found: dict[str, Any] = {"code": int(code or 0)}
    if found["code"]:
        found["said"] = errors.getvalue().strip().splitlines()[-3:]
    return found


def succeed(program: str, *arguments: object) -> None:
    """As `run`. Raises `RuntimeError` if the command fails."""
    found = run(program, *arguments)
    if found["code"]:
        raise RuntimeError(f"{program} {arguments[0]} ended with {found['code']}: {' '.join(found['said'])}")


def wait() -> None:
    """Wait until the GPU has done what it was told."""
    import torch

    if CUDA:
        torch.cuda.synchronize()


@dataclass
class Peak:
    """Peak memory since it was made: bytes that torch allocated on the GPU, or the resident set of this process."""

    def __post_init__(self) -> None:
        import torch

        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux starts VmHWM anew.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        """The peak, in GB."""
        import torch

        if CUDA:
            return round(torch.cuda.max_memory_allocated() / 1e9, 3)
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) * 1024 / 1e9, 3) if found else 0.0


def host_gigabytes() -> float:
    """Peak resident set of this process, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


@contextlib.contextmanager
def timed(*functions: tuple[Any, str, str]) -> Iterator[dict[str, dict[str, float]]]:
    """Measure the seconds and the peak memory of functions while the body runs.

    Args:
        functions: The module, the name of the function in it, and the name of the step.

    Yields:
        Name of the step to its ``seconds`` (summed over calls) and ``peak_gb`` (of the last call).
    """
    steps: dict[str, dict[str, float]] = {}

    def wrapped(real: Callable[..., Any], step: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            # A step inside another step leaves the peak of the outer one alone.
            peak = None if ":" in step else Peak()
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                wait()
                entry = steps.setdefault(step, {"seconds": 0.0})
                entry["seconds"] = round(entry["seconds"] + time.perf_counter() - began, 3)
                if peak is not None:
                    entry["peak_gb"] = peak.gigabytes()

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, step in functions:
            real = getattr(owner, name)
            setattr(owner, name, wrapped(real, step))
            stack.callback(setattr, owner, name, real)
        yield steps
