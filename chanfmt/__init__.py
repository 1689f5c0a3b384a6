"""Measure which FFN channels of a model matter, and work with the answer.

The answer is an importance atlas: one HDF5 file with sums, metrics and labels for every channel. `merge`, `relabel`,
`compare` and `report` take an atlas as an open `Atlas`, as a path, or as an address on the Hub
(``hf://datasets/USER/NAME[@REVISION]/FILE``), and close an atlas that they open by name. `validate` takes a path or an
address.

>>> import chanfmt
>>> with chanfmt.build("HuggingFaceTB/SmolLM2-135M", "smollm2.h5") as atlas:  # doctest: +SKIP
...     atlas.stacks["decoder"]["lp"].shape
(30, 1536)

Notes and warnings go to the logger ``chanfmt``. Every failure that a user can mend is a `ChanfmtError`, whose ``message``
says what is wrong and whose ``hint`` says what to do.

`chanfmt.analysis` holds the statistics of a report as functions of arrays, and `chanfmt.plot` draws figures. `surgery` cuts models with atlases. The command
lines are ``atlas``, ``surgery`` and ``atlas-tui``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt import analysis
from chanfmt.base.errors import AtlasError, ChanfmtError, CheckError, MissingPackageError, ModelError, UsageError
from chanfmt.base.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel

    from chanfmt import plot
    from chanfmt.algebra.compare import FFNComparison
    from chanfmt.algebra.validate.findings import Finding
    from chanfmt.format.reader import Atlas
    from chanfmt.models.source import ModelSource
    from chanfmt.reporting.make import Report

    Given = Atlas | str | os.PathLike[str]
    Model = ModelSource | str | os.PathLike[str]

__all__ = [
    "AtlasError",
    "ChanfmtError",
    "CheckError",
    "MissingPackageError",
    "ModelError",
    "UsageError",
    "__version__",
    "analysis",
    "build",
    "compare",
    "merge",
    "open",
    "plot",
    "relabel",
    "report",
    "validate",
]


def __getattr__(name: str) -> Any:
    # The figures need numpy, which takes longer to import than everything else here.
    if name != "plot":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("chanfmt.plot")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def open(path: str | os.PathLike[str], *, verify: bool = False, contained: bool = False) -> Atlas:
    """Open an importance atlas for reading.

    Use the result in a ``with`` statement, or call its ``close``. Arrays are read when they are asked for.

    Args:
        path: The file, or ``hf://datasets/USER/NAME[@REVISION]/FILE``.
        verify: Whether to recompute the digests, and to refuse a file that was changed (0.1 s per 40 MB).
        contained: Whether to try the file in a process of its own first, which protects from files that crash HDF5.

    Returns:
        The atlas: records of what was measured, and the arrays of every stack of FFNs.

    Raises:
        AtlasError: The file is missing, is not an atlas, or is damaged or unsafe.
        ChanfmtError: The file cannot be fetched from the Hub.
    """
    from chanfmt.hub.locate import open_atlas

    return open_atlas(path, verify=verify, contained=contained)


def build(
    model: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str],
    text: str | os.PathLike[str] | Iterable[str] = "wikitext2",
    *,
    tokenizer: Any = None,
    name: str = "",
    revision: str | None = None,
    sequences: int = 64,
    seq_len: int = 512,
    bos: str = "auto",
    seed: int = 0,
    loss: str = "auto",
    rho: float = 0.01,
    eta: float = 0.10,
    support_size: int = 256,
    alpha: float = 0.2,
    gamma: float = 8.0,
    batch_size: int | str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    stream: bool = False,
    memory: str = "auto",
    store_tokens: bool = True,
    columns: str | Iterable[str] = "none",
    drivers: int = 8,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Atlas:
    """Measure every FFN channel of a model in one pass over calibration text, and write the atlas.

    The pass is a forward pass and an activation-only backward pass: about 4 FLOP per parameter and token. LP is in nats^2
    per token, and does not depend on batch size or sequence length (paper equation 4; spec section "Metrics").

    Args:
        model: A Hub id, a directory, a ``.gguf`` file, or a loaded transformers model, which is left as it was.
        out: File to write, such as ``llama.h5``.
        text: Calibration text as ``--calib`` takes it: ``wikitext2``, ``c4``, ``pydoc``, ``self``, a file, a data set, or
            several of these, each with an optional ``=WEIGHT``. A ``.npz`` or ``.safetensors`` file holds arrays for
            models that do not take text.
        tokenizer: The tokenizer of a loaded model. Other models bring their own.
        name: Name of a loaded model in the atlas (default: the name in its config).
        revision: Branch, tag or commit of a model on the Hub.
        sequences: Number of calibration sequences.
        seq_len: Tokens in a sequence, special tokens included.
        bos: Special tokens around each sequence: ``auto`` for those that the tokenizer puts around a text, such as BOS, or CLS
            and SEP; ``always`` for BOS too if the tokenizer has one and does not add it; ``never`` for none.
        seed: Seed of the sample of the text.
        loss: What is differentiated: ``next-token``, ``masked-token``, ``reconstruction``, ``embedding``, ``labels``, or
            ``auto`` for the loss that the model was made for.
        rho: Share of channels that are supernodes (paper definition 1).
        eta: Share of the other channels that are halo (paper definition 2).
        support_size: Residual dimensions in the write support.
        alpha, gamma: Floor and exponent of the protection factor (paper equation 10).
        batch_size: Sequences in a batch; ``auto`` fits the memory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ... A loaded model stays on its device and in its dtype.
        device_map: ``auto`` spreads the model over all GPUs of the machine.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or ``float64``. ``auto`` is float32 on a CPU, and the
            checkpoint's own dtype on other devices.
        stream: Whether to keep only one block of the model in memory at a time: short for ``memory="stream"``.
        memory: What is in memory at a time: ``whole`` for the weights and what all blocks keep for the backward pass,
            ``recompute`` for the weights and the activations of one block, ``stream`` for one block, or ``auto`` for the first
            of these that is predicted to fit.
        store_tokens: Whether the atlas holds the token ids, or only their hashes.
        columns: Groups of further columns to measure in the same pass: ``peaks``, ``positions``, ``activity``,
            ``drivers``, several of them, ``all``, or ``none``.
        drivers: Number of driving tokens of each channel that ``drivers`` keeps.
        trust_remote_code: Whether code from the model's repository may run.
        resume: Whether to continue an interrupted build from the partial atlas next to ``out``.
        overwrite: Whether an existing ``out`` is replaced.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.

    Returns:
        The atlas, open.

    Raises:
        UsageError: An option is out of range, the text cannot be read, or ``out`` cannot be written.
        ModelError: The model cannot be loaded, or has no FFN that can be measured. The message names the module.
        ChanfmtError: Memory or the disk ran out. A partial atlas stays, which ``resume`` continues.
    """
    import os

    from chanfmt.base.narrate import bars
    from chanfmt.building.build import build as build_atlas
    from chanfmt.building.loaded import build_loaded
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import LabelSettings
    from chanfmt.hub.locate import locate_model

    by_name = isinstance(model, str | os.PathLike)
    if by_name and (tokenizer is not None or name):
        raise UsageError(
            "tokenizer and name are for a loaded model", hint="leave them out, or pass the loaded model instead of its name"
        )
    sources = (os.fspath(text),) if isinstance(text, str | os.PathLike) else tuple(text)
    if any("\n" in source for source in sources):
        raise UsageError(
            "text is the name of a source, not the text itself", hint="write the text to a .txt file, and pass its path"
        )
    options = BuildOptions(
        model=os.fspath(model) if by_name else "",
        output=os.fspath(out),
        revision=revision,
        calib=sources,
        loss=loss,
        sequences=sequences,
        seq_len=seq_len,
        bos=bos,
        seed=seed,
        batch_size=str(batch_size),
        device=str(device),
        device_map=device_map,
        dtype=str(dtype).removeprefix("torch."),
        stream=stream,
        memory=memory,
        no_store_tokens=not store_tokens,
        columns=columns if isinstance(columns, str) else ",".join(columns) or "none",
        drivers=drivers,
        trust_remote_code=trust_remote_code,
        resume=resume,
        overwrite=overwrite,
    )
    settings = LabelSettings(rho=rho, eta=eta, support_size=support_size, alpha=alpha, gamma=gamma)
    with bars(progress):
        if by_name:
            path = build_atlas(options, settings, locate_model)
        else:
            path = build_loaded(model, tokenizer, options, settings, id=name)
    return Atlas.open(path)


def merge(
    atlases: Iterable[Given],
    out: str | os.PathLike[str],
    *,
    model: Model | None = None,
    overwrite: bool = False,
) -> Atlas:
    """Write one atlas of all sequences of several atlases of one model. Sums add up exactly, in any order.

    Args:
        atlases: Two or more atlases, measured on different sequences.
        out: File to write.
        model: The model that was measured: a Hub id, a directory or a ``.gguf`` file. With its weights the result has
            connectivity and a halo, which do not merge.
        overwrite: Whether an existing ``out`` is replaced.

    Returns:
        The merged atlas, open. Its ``dropped`` names what it does not hold.

    Raises:
        AtlasError: The atlases do not merge: other models, settings or losses, or the same sequences.
        UsageError: There are fewer than two atlases, or ``out`` cannot be written.
        ModelError: ``model`` is not the model that was measured.
    """
    import os

    from chanfmt.format.reader import Atlas
    from chanfmt.hub.rewriting import write_merged

    if isinstance(atlases, str | os.PathLike | Atlas):
        atlases = (atlases,)
    return Atlas.open(write_merged(atlases, out, model=model, overwrite=overwrite))


def relabel(
    atlas: Given,
    out: str | os.PathLike[str],
    *,
    rho: float | None = None,
    eta: float | None = None,
    support_size: int | None = None,
    alpha: float | None = None,
    gamma: float | None = None,
    model: Model | None = None,
    overwrite: bool = False,
) -> Atlas:
    """Write an atlas with the labels of other settings. Nothing is measured again.

    Args:
        atlas: The atlas. Its digests are checked first.
        out: File to write. It may be the file of ``atlas``, with ``overwrite``.
        rho, eta, support_size, alpha, gamma: New settings, as in `build`; None keeps the old one.
        model: The model that was measured. Its weights give connectivity for the new settings.
        overwrite: Whether an existing ``out`` is replaced.

    Returns:
        The new atlas, open. Its ``dropped`` names what has no meaning with the new settings.

    Raises:
        UsageError: A setting is out of range, or ``out`` cannot be written.
        AtlasError: The atlas is damaged or unfinished.
        ModelError: ``model`` is not the model that was measured.
    """
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from chanfmt.hub.rewriting import write_relabelled

    given = {"rho": rho, "eta": eta, "support_size": support_size, "alpha": alpha, "gamma": gamma}
    changes = {name: value for name, value in given.items() if value is not None}
    write_relabelled(atlas, out, changes, model=model, overwrite=overwrite)
    return Atlas.open(Path(out))


def validate(atlas: Given) -> list[Finding]:
    """Check a file against the specification: structure, references, values, digests (spec section "Validation").

    The file is read in a process of its own, with limits on time and memory, so hostile files are safe to check.

    Args:
        atlas: The file, or ``hf://datasets/USER/NAME[@REVISION]/FILE``. Of an open atlas, its file is checked.

    Returns:
        The findings. Each has a ``code``, a ``path`` in the file, a ``message`` and a ``rule`` with the severity and what
        to do. The list is empty if nothing is wrong.

    Raises:
        UsageError: The file does not exist.
        ChanfmtError: The file cannot be fetched from the Hub.
    """
    from chanfmt.algebra.validate.contained import validate_contained
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.locate import locate_atlas

    path = atlas.path if isinstance(atlas, Atlas) else locate_atlas(atlas).path
    return validate_contained(path)


def compare(first: Given, second: Given, metric: str = "lp") -> list[FFNComparison]:
    """Compare two atlases of one architecture, FFN by FFN: rank correlation and the overlap of the labels.

    Args:
        first, second: The atlases.
        metric: Metric whose ranks are compared, such as ``lp``.

    Returns:
        One `FFNComparison` per FFN, in model order: the rank correlation, and Jaccard indices of supernodes and halo, each
        with the value that chance gives.

    Raises:
        AtlasError: The FFNs differ, or an atlas lacks the metric.
    """
    from chanfmt.algebra.compare import compare as compare_atlases
    from chanfmt.hub.locate import opened

    with opened(first) as one, opened(second) as other:
        return compare_atlases(one, other, metric)


def report(
    atlas: Given | Sequence[Given] | Mapping[str, Given], out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> Report:
    """Make a report of what an atlas shows, next to the paper's findings, with intervals and controls.

    Args:
        atlas: The atlas. A list, or a dictionary from names to atlases, makes one report of all: claims x atlases, and figures
            with a line for each atlas.
        out: Directory to write: a page, Markdown, JSON, figures and CSV files; or NAME.html for the page alone. None writes
            nothing.
        overwrite: Whether an earlier report in ``out`` is replaced.

    Returns:
        The report as data: sections with claims, tables and plots. A report of several has ``members``, the report of each.

    Raises:
        AtlasError: The atlas holds no measured LP.
        UsageError: ``out`` cannot be written.
        MissingPackageError: ``out`` without matplotlib (``pip install 'chanfmt[plot]'``).
    """
    import contextlib

    from chanfmt.base.claims import claimed
    from chanfmt.base.files import output_path
    from chanfmt.hub.locate import opened
    from chanfmt.reporting.family import make_family
    from chanfmt.reporting.make import make_report
    from chanfmt.reporting.names import named_atlases
    from chanfmt.reporting.pages import check_output, write

    output = None if out is None else output_path(out)
    if output is not None:
        check_output(output, overwrite=overwrite)
    named = named_atlases(atlas)
    with contextlib.nullcontext() if output is None else claimed(output):
        with contextlib.ExitStack() as stack:
            given = [stack.enter_context(opened(item)) for item in named.values()]
            made = make_report(given[0]) if len(given) == 1 else make_family(given, list(named))
        if output is not None:
            write(made, output, overwrite=overwrite)
    return made
