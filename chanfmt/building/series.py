"""`atlas build --revisions`: one atlas for each revision of a model, one after the other."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.base.inputs import input_path
from chanfmt.base.narrate import say
from chanfmt.building.build import build
from chanfmt.building.requirements import check_requirements
from chanfmt.data.text import ARRAYS, SELF, read_text
from chanfmt.format.reader import Atlas
from chanfmt.format.records import NO_SPECIAL_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chanfmt.building.build import Locate
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import CalibrationRecord, LabelSettings

HINT = "choose another -o, or add --overwrite"


def members(options: BuildOptions) -> list[tuple[str, BuildOptions]]:
    """Every revision with the options of its own build, in the order given.

    A revision of a local directory is a directory inside it, such as ``checkpoint-100``.

    Raises:
        UsageError: Two revisions would be written to one file, or a local directory lacks a revision.
    """
    model = input_path(options.model)
    found: dict[str, tuple[str, BuildOptions]] = {}
    for revision in options.revision_names:
        name = re.sub(r"[^\w.-]+", "-", revision).lstrip(".") + ".h5"
        if name in found:
            raise UsageError(f"--revisions: {revision} and {found[name][0]} would both be written to {name}")
        member = dataclasses.replace(options, revisions=None, output=str(options.path / name))
        if os.path.isdir(model):
            if not os.path.isdir(model / revision):
                inside = sorted(item.name for item in model.iterdir() if item.is_dir())
                raise UsageError(
                    f"--revisions: {model} has no directory {revision}",
                    hint=f"directories in it: {', '.join(inside[:20]) or 'none'}",
                )
            member = dataclasses.replace(member, model=str(model / revision))
        else:
            member = dataclasses.replace(member, revision=revision)
        found[name] = (revision, dataclasses.replace(member, resume=os.path.lexists(member.partial)))
    return list(found.values())


def build_series(options: BuildOptions, settings: LabelSettings, locate: Locate) -> list[Path]:
    """Write an atlas of every revision into the directory ``options.path``. Returns their paths, in the order given.

    An atlas that exists already is left as it is, and an unfinished build is continued. So the same command continues after
    any interruption. Files that were downloaded for one revision are removed from the Hub's cache before the next revision,
    unless they were there before.

    Raises:
        ChanfmtError: As for `build`, or an existing atlas was made with other options.
    """
    check_requirements(options)
    settings.check()
    if os.path.exists(options.path) and not os.path.isdir(options.path):
        raise UsageError(f"{options.path} is a file", hint="with --revisions, -o names a directory")
    if any(parent.is_file() for parent in options.path.parents):
        raise UsageError(f"cannot write {options.path}: {os.strerror(errno.ENOTDIR)}", hint="choose another -o")
    chosen = members(options)
    try:
        options.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {options.path}: {error.strerror}", hint="choose another -o") from None
    paths = []
    text_of = functools.cache(_text)
    for place, (revision, member) in enumerate(chosen):
        paths.append(member.path)
        if os.path.exists(member.path) and not options.overwrite:
            _check_same(member, settings, text_of)
            say(f"{revision}: {member.path} exists already")
            continue
        say(f"{revision} ({place + 1} of {len(chosen)})")
        before = set(_cached(options.model))
        build(member, settings, locate)
        _forget(options.model, before)
    return paths


def _check_same(member: BuildOptions, settings: LabelSettings, text_of: Callable[[str], tuple[str, str] | None]) -> None:
    """Raise `AtlasError` if the atlas of ``member``, which exists, was made with other options than these."""
    with Atlas.open(member.path, contained=True) as atlas:
        model, calibration = atlas.model, atlas.calibration
        local = os.path.isdir(input_path(member.model))
        name = Path(member.model).resolve().name if local else member.model
        # The content of a file or data set may have changed under its name.
        asked = {source: text_of(source) for source in member.shares}
        # If a text has fewer sequences than asked for, all different ones were taken.
        blocks = sum(int(row.range.rpartition(":")[2]) for row in calibration.contributions)
        measured = {(row.source, row.revision) for row in calibration.contributions}
        for what, found, wanted in (
            ("model", model.id, name),
            (
                "calibration",
                f"{calibration.sequences} x {calibration.seq_len} tokens",
                f"{member.sequences if blocks >= member.sequences else calibration.sequences} x {member.seq_len} tokens",
            ),
            ("seed", calibration.seed, member.seed),
            ("labelling", _told(atlas.labels), _told(settings)),
        ):
            if found != wanted:
                raise AtlasError(f"{member.path} was made with another {what}: {found}, not {wanted}", hint=HINT)
        if member.inputs is None and not _begins_as_asked(member.bos, calibration):
            raise AtlasError(
                f"{member.path} was made with another --bos than {member.bos}: its sequences {calibration.ends}", hint=HINT
            )
        if None not in asked.values() and measured != set(asked.values()):
            raise AtlasError(
                f"{member.path} was measured on other text: {', '.join(sorted(source for source, _ in measured))}, "
                f"not {', '.join(asked)} as it is now",
                hint=HINT,
            )


def _begins_as_asked(bos: str, calibration: CalibrationRecord) -> bool:
    """Whether sequences begin as ``--bos`` asks for. An older atlas does not say, and counts as one that does."""
    special = calibration.special_tokens
    if special is None:
        return True
    if bos == "always":
        return bool(special.before)
    return special == (NO_SPECIAL_TOKENS if bos == "never" else calibration.tokenizer_special_tokens)


def _told(settings: LabelSettings) -> str:
    return f"rho {settings.rho:g}, eta {settings.eta:g}, support {settings.support_size}, score {settings.score}"


def _text(source: str) -> tuple[str, str] | None:
    """Name and SHA-256 of a text source; None if the source is not a text."""
    if source == SELF or Path(source).suffix in ARRAYS:
        return None
    text = read_text(source, "calibrate")
    return text.source, text.revision


def _cached(model: str) -> Iterator[str]:
    """The commits of a model that the Hub's cache holds."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in repositories:
        if repository.repo_type == "model" and repository.repo_id == model:
            yield from (revision.commit_hash for revision in repository.revisions)


def _forget(model: str, before: set[str]) -> None:
    """Remove the commits of ``model`` from the Hub's cache that are not in ``before``. Files of other commits stay."""
    new = set(_cached(model)) - before
    if new:
        from huggingface_hub import scan_cache_dir

        scan_cache_dir().delete_revisions(*new).execute()
