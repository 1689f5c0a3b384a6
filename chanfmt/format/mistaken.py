"""What a path seems to be that was named in place of something else, and the command that takes it."""

from __future__ import annotations

import os


def looks_like(path: str | os.PathLike[str]) -> str:
    """What ``path`` seems to be: ``result``, ``model``, ``atlas``, ``plan`` or ``name``; empty if it may be anything.

    Nothing is opened. A ``name`` is a path that does not exist, such as the id of a repository.
    """
    path = os.path.expanduser(os.fspath(path))
    if path.startswith("hf://"):
        return "atlas"
    if os.path.isfile(os.path.join(path, "surgery.json")):
        return "result"
    if path.endswith(".gguf") or os.path.isfile(os.path.join(path, "config.json")):
        return "model"
    if path.endswith((".h5", ".hdf5")):
        return "atlas"
    if path.endswith(".safetensors"):
        return "plan"
    return "" if os.path.exists(path) else "name"


def way_out(path: str | os.PathLike[str]) -> str:
    """A hint for someone who named ``path``, which is not an atlas, where an atlas was needed."""
    path = os.fspath(path)
    kind = looks_like(path)
    if kind == "result":
        inside = os.path.join(path, "atlas.h5")
        return f"the atlas of this result is {inside}" if os.path.isfile(inside) else "name the atlas that the result was cut by"
    if kind == "model":
        return f"this is a model; measure it with: atlas build {path} -o FILE"
    if kind == "plan":
        return "a plan is applied with: surgery apply PLAN --model MODEL"
    return "an atlas is a file that atlas build writes: atlas build MODEL -o FILE"
