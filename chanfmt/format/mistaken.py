"""What a path seems to be that was named in place of an atlas, and the command that takes it."""

from __future__ import annotations

import os


def way_out(path: str | os.PathLike[str]) -> str:
    """A hint for someone who named ``path``, which is not an atlas, where an atlas was needed."""
    path = os.fspath(path)
    if os.path.isfile(os.path.join(path, "surgery.json")):
        inside = os.path.join(path, "atlas.h5")
        return f"the atlas of this result is {inside}" if os.path.isfile(inside) else "name the atlas that the result was cut by"
    if path.endswith(".gguf") or os.path.isfile(os.path.join(path, "config.json")):
        return f"this is a model; measure it with: atlas build {path} -o FILE"
    if path.endswith(".safetensors"):
        return "a plan is applied with: surgery apply PLAN --model MODEL"
    return "an atlas is a file that atlas build writes: atlas build MODEL -o FILE"
