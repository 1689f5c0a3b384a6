"""The memory that this process may still use, on a bare machine and inside a container."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path("/")
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")
"""Lines of a control group's ``memory.stat`` with the pages of files that the kernel frees on demand, by both versions' names."""


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may still use: the free memory of the machine, or less if a control group limits the process.

    The kernel counts the pages of files that were read as memory used by a control group, and frees these pages when memory
    is needed. They therefore count as available, as they do in ``MemAvailable`` of the machine.

    Args:
        root: Root of the file system that holds ``proc`` and ``sys``.
    """
    machine = _meminfo(root, "MemAvailable")
    if machine is None:
        # Other systems do not say what is free. Half of the memory is a guess that leaves room for other programs.
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([machine, *_groups(root)]))


def known_memory(root: Path = _ROOT) -> int | None:
    """As `available_memory`, without a guess: None if neither the machine nor a control group says what is left."""
    machine = _meminfo(root, "MemAvailable")
    left = [*([] if machine is None else [machine]), *_groups(root)]
    return max(0, min(left)) if left else None


def free_swap(root: Path = _ROOT) -> int:
    """Bytes of free swap space; 0 if that is not known."""
    return _meminfo(root, "SwapFree") or 0


def _meminfo(root: Path, name: str) -> int | None:
    """Bytes in the line ``name`` of ``/proc/meminfo``; None if there is no such line."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024 if name in lines else None


def _groups(root: Path) -> Iterator[int]:
    """What each control group of this process leaves, in bytes: its own group and the groups around it, of both versions."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        home = root / "sys/fs/cgroup"
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            home = home / "memory"
        # A container often sees its own group as the root, and still reads the path that the group has on the host.
        place = home / path.strip("/")
        for directory in (place, *place.parents):
            if not directory.is_relative_to(home):
                break
            yield from _left(directory)


def _left(directory: Path) -> Iterator[int]:
    """The limits of one control group, less what its processes use without the pages of files."""
    used = _number(directory, "memory.current", "memory.usage_in_bytes")
    if used is None:
        return
    used -= _cached(directory)
    for names in (("memory.max", "memory.limit_in_bytes"), ("memory.high",)):
        limit = _number(directory, *names)
        if limit is not None:
            yield limit - used


def _cached(directory: Path) -> int:
    """Bytes of file pages that the kernel can free. Version 1 has totals, which hold the groups inside too."""
    try:
        lines = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        own, total = (sum(int(lines.get(name, 0)) for name in names) for names in (_CACHE[:2], _CACHE[2:]))
    except (OSError, ValueError):
        return 0
    return total or own


def _number(directory: Path, *names: str) -> int | None:
    """The number in the first of the files ``names`` that exists; None if there is none, or if it holds ``max``."""
    for name in names:
        try:
            text = (directory / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None
