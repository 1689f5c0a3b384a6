"""Atlases as data sets on the Hub: publishing an atlas with a card."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.algebra.metrics import holds_gradients
from chanfmt.algebra.validate.contained import validate_contained
from chanfmt.algebra.validate.findings import ERROR
from chanfmt.base.command_line import tells_directories
from chanfmt.base.errors import AtlasError
from chanfmt.base.hub_ids import is_hub_id
from chanfmt.base.markdown import code, fenced, inline, table
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line, percentage
from chanfmt.format.records import MEMORY_PREDICTION
from chanfmt.hub.locate import SUFFIX
from chanfmt.hub.names import HubFile
from chanfmt.hub.publish import full_name, publish_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.hub.publish import Published, PublishOptions

TAGS = ("chanfmt", "channel-importance-atlas", "interpretability", "pruning")


def check_valid(path: Path, name: str) -> None:
    """Raise `AtlasError` if the file ``path``, called ``name`` in the error, breaks a rule of the specification."""
    broken = [finding for finding in validate_contained(path) if finding.rule.severity == ERROR]
    if broken:
        raise AtlasError(
            f"{name} is not a valid atlas: {broken[0].code} {broken[0].path} {broken[0].message}",
            hint=f"see: atlas validate {name}",
            code=broken[0].code,
            where=broken[0].path,
        )


def publish_atlas(
    atlas: Atlas,
    repo: str,
    layers: tuple[Sequence[str], Sequence[Sequence[str]]],
    options: PublishOptions,
) -> tuple[Published, HubFile]:
    """Publish a valid ``atlas`` with a card as a data set.

    Args:
        repo: ``USER/NAME``, or ``NAME`` for a repository of the logged-in user.
        layers: Headings and rows of the table of layers in the card.

    Returns:
        The published repository, and the address of the file at the new commit.

    Raises:
        AtlasError: ``atlas`` is a partial atlas.
        UsageError, HubError, CheckError: As `chanfmt.hub.publish.publish_folder` raises them.
    """
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    repo = full_name(repo)
    name = atlas.path.name if atlas.path.suffix == SUFFIX else atlas.path.name + SUFFIX
    if any(map(tells_directories, atlas.producer.commands())):
        say(f"note: {name} records commands with paths of a machine; the card leaves these commands out, but the file holds them")
    calibration = atlas.calibration
    message = f"Atlas of {atlas.model.id}: {len(atlas.blocks)} FFNs, {calibration.tokens:,} tokens, {atlas.content_sha256[:12]}"
    with tempfile.TemporaryDirectory(prefix="atlas-push-") as text:
        folder = Path(text)
        (folder / name).symlink_to(atlas.file.resolve())
        (folder / "README.md").write_text(atlas_card(atlas, HubFile(repo, file=name), layers), encoding="utf-8")
        done = publish_folder(folder, repo, kind="dataset", message=message, options=options)
    return done, HubFile(repo, "dataset", done.commit, name)


def atlas_card(atlas: Atlas, place: HubFile, layers: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """The card of an atlas, as Markdown with front matter: model, calibration text, layers, origin, use.

    Args:
        place: Address that the file will have.
        layers: Headings and rows of the table of layers.
    """
    from huggingface_hub import DatasetCardData

    model, calibration, labels, producer = atlas.model, atlas.calibration, atlas.labels, atlas.producer
    front = DatasetCardData(pretty_name=one_line(f"Channel importance atlas of {model.id}"), tags=list(TAGS), viewer=False)
    known = model.source == "hub" and is_hub_id(model.id)
    link = f"[{inline(model.id)}](https://huggingface.co/{model.id})" if known else inline(model.id)
    model_rows = [
        ["id", model.id],
        ["commit", model.revision or "none (a local model)"],
        ["type", f"{model.model_type}, {model.parameters:,} parameters, measured in {model.dtype}"],
        ["fingerprint", model.fingerprint],
    ]
    text_rows = [[row.source, row.revision, f"{row.sequences:,}", f"{row.tokens:,}"] for row in calibration.contributions]
    stored = (
        "The token ids of this text are in the file."
        if calibration.token_ids is not None
        else "The file holds digests of this text, not the text."
    )
    if holds_gradients(atlas.stacks.values()):
        loss, method = f"Loss: {inline(calibration.loss)}; its mean was {calibration.mean_loss:.3f}.", []
    else:
        loss, method = "The atlas holds no metric that needs a gradient of a loss.", ["--method", "activation"]
    proxy = "LP is the loss proxy 1/2 E[(u dL/du)^2]. " if any("lp" in stack for stack in atlas.stacks.values()) else ""
    origin_rows = [
        ["content_sha256", atlas.content_sha256],
        ["format", f"channel-importance-atlas {atlas.format_version}"],
        ["made by", ", ".join(f"{name} {version}" for name, version in producer.versions.items())],
        ["on", f"{producer.hardware}, {producer.seconds:,.0f} s"],
        *([["command", _public(producer.command)]] if producer.command else []),
        *(
            ["then", _public(json.dumps(dict(line), sort_keys=True))]
            for line in producer.history
            if MEMORY_PREDICTION not in line
        ),
    ]
    return "\n".join(
        [
            "---",
            front.to_yaml(),
            "---",
            "",
            f"# {inline(place.repo)}",
            "",
            f"How much each FFN channel of {link} matters: sufficient statistics, metrics and labels per channel, in one HDF5 file, "
            f"{code(place.file or '')}, for chanfmt.",
            "",
            "## Model",
            "",
            table(["", ""], model_rows),
            "",
            "## Calibration",
            "",
            table(["text", "revision", "sequences", "tokens"], text_rows),
            "",
            f"Sequences of {calibration.seq_len:,} tokens. {loss} {stored}"
            + (f" Sequences {calibration.ends} (token ids)." if calibration.special_tokens else ""),
            "",
            "## Concentration per layer",
            "",
            table(*layers),
            "",
            f"{proxy}Supernodes: top {percentage(labels.rho, 2)} of a layer by {inline(labels.score)}; halo: "
            f"next {labels.eta:.0%} by connectivity to {labels.support_size} dimensions.",
            "",
            "## Provenance",
            "",
            table(["", ""], origin_rows),
            "",
            "## Use",
            "",
            "```sh",
            fenced(shlex.join(["atlas", "info", str(place)])),
            fenced(shlex.join(["atlas", "pull", place.repo, "-o", place.file or ""])),
            fenced(shlex.join(["surgery", "prune", str(place), "--sparsity", "0.5", *method])),
            "```",
            "",
        ]
    )


def _public(text: str) -> str:
    return "left out here, because it names directories of a machine; the file holds it" if tells_directories(text) else text
