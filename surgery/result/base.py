"""The model that was cut: its name on the Hub, its licence, and the duties of those who pass the result on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.hub_ids import is_hub_id
from chanfmt.base.inputs import file_size
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.models.source import ModelSource
    from surgery.cut.source import Named

NOTICE_FILE = "NOTICE"

_LICENSE_FILE = re.compile(r"(licen[sc]e|copying)([._-].*)?", re.IGNORECASE)
_MAX_CARD = 4 << 20
_MAX_TEXT = 200


@dataclass(frozen=True)
class Base:
    """The model that was cut.

    Attributes:
        id, revision, source: As in `chanfmt.format.records.ModelRecord`.
        license: The Hub's identifier of the licence, such as ``apache-2.0``, or ``other``; empty if nothing names a licence.
        license_name, license_link: For a licence ``other``: its name, and a file of the repository or a URL.
    """

    id: str
    revision: str
    source: str
    license: str = ""
    license_name: str = ""
    license_link: str = ""

    @property
    def terms(self) -> Terms | None:
        """The duties that the licence names; None if this module knows of none."""
        return _TERMS.get(self.license_name if self.license == "other" else self.license)


@dataclass(frozen=True)
class Terms:
    """What a licence demands of those who pass on a changed model, besides a copy of the licence.

    Attributes:
        notice: Text that a file NOTICE must hold.
        statement: Words that must be shown.
        prefix: Beginning that the model's name must have.
    """

    notice: str
    statement: str = ""
    prefix: str = ""

    def allows(self, name: str) -> bool:
        """Whether a repository may be called ``name``."""
        return re.sub(r"[-_]", " ", name.lower()).startswith(self.prefix.lower())


def _llama(version: str) -> Terms:
    return Terms(
        f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
        "Built with Llama",
        "Llama",
    )


_TERMS = {
    "llama2": Terms(
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    ),
    "llama3": Terms(
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
        "Built with Meta Llama 3",
        "Llama 3",
    ),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2"),
    "llama3.3": _llama("3.3"),
    "llama4": _llama("4"),
    "gemma": Terms("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"),
}
"""The Hub's identifier of a licence to its terms."""


def read_base(model: Named | ModelSource, directory: Path) -> Base:
    """``model``, with the licence that the card in ``directory`` names, or else that of a licence file there."""
    fields = _card_fields(directory / "README.md")
    license, name, link = (_text(fields.get(key)) for key in ("license", "license_name", "license_link"))
    if not license and (file := _license_file(directory)):
        license, name, link = "other", _title(file), file.name
    if link and model.source == "hub" and is_hub_id(model.id) and "://" not in link and not (directory / link).is_file():
        link = f"https://huggingface.co/{model.id}/blob/main/{link}"
    return Base(model.id, model.revision, model.source, license.lower(), name, link)


def _card_fields(path: Path) -> dict[str, Any]:
    """The front matter of a card that others wrote; empty if there is none, or if it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        if file_size(path) > _MAX_CARD:
            return {}
        return metadata_load(path) or {}
    # A mistake in a card, which is text for people, must not stop the cut. YAML raises many kinds of errors.
    except Exception:
        return {}


def _text(value: Any) -> str:
    """A text field in one line. A list of one text is that text, because licences may be given so."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return " ".join(one_line(value, _MAX_TEXT).split()) if isinstance(value, str) else ""


def _license_file(directory: Path) -> Path | None:
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return next((path for path in files if _LICENSE_FILE.fullmatch(path.name)), None)


def _title(file: Path) -> str:
    """The first line of a licence, as an identifier."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        lines = stream.read(_MAX_CARD).splitlines()
    first = next((line for line in lines if line.strip()), "")
    return re.sub(r"[^a-z0-9.]+", "-", first.lower()).strip("-.")[:_MAX_TEXT] or "see-file"
