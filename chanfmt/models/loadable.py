"""A model's directory as transformers can load it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.models.safetensors import INDEX_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.safetensors import CheckpointIndex


@contextlib.contextmanager
def loadable(index: CheckpointIndex) -> Iterator[Path]:
    """Give the body a directory that ``from_pretrained`` loads: the checkpoint's, unless its index lacks the field ``metadata``.

    Nothing needs that field, and transformers fails without it. The body then gets a temporary directory of links to the
    files, with the field in the index.
    """
    if index.described:
        yield index.directory
        return
    with tempfile.TemporaryDirectory(prefix="chanfmt-") as directory:
        for path in index.directory.iterdir():
            if path.name != INDEX_FILE:
                (Path(directory) / path.name).symlink_to(path.resolve())
        fields = json.loads((index.directory / INDEX_FILE).read_bytes())
        (Path(directory) / INDEX_FILE).write_text(json.dumps(fields | {"metadata": {}}), encoding="utf-8")
        yield Path(directory)
