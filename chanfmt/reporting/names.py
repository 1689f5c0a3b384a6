"""Names of atlases in a report of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.format.reader import Atlas

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence


def short_names(atlases: Sequence[Atlas | str | os.PathLike[str]]) -> list[str]:
    """A name for each of ``atlases``: its file's, with as many parent directories as are needed to make the names different.

    The second atlas of one file has a number behind its name. What is not an atlas has a name too: whoever opens it says so.
    """
    paths = [atlas.path if isinstance(atlas, Atlas) else Path(str(atlas)) for atlas in atlases]
    parts = [[*path.resolve().parent.parts, path.stem] for path in paths]
    depth = next(
        (
            depth
            for depth in range(1, 1 + max(map(len, parts), default=0))
            if len({tuple(item[-depth:]) for item in parts}) == len({tuple(item) for item in parts})
        ),
        1,
    )
    seen: Counter[str] = Counter()
    names = []
    for item in parts:
        name = "/".join(item[-depth:])
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def named_atlases(atlases: Any) -> dict[str, Any]:
    """Atlases by name: a mapping as it is, and one atlas or a sequence of atlases by `short_names`."""
    if isinstance(atlases, Mapping):
        return dict(atlases)
    given = list(atlases) if isinstance(atlases, list | tuple) else [atlases]
    return dict(zip(short_names(given), given, strict=True))
