"""The sparsity at which a plan's result has a size. Pure numpy.

Widths are rounded to multiples, and FFNs that share a config field are written equally wide. The search therefore asks for
the size that the plan will write, and not for the share of channels that the target names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError, UsageError
from surgery.planning.choice import Choice, Scores
from surgery.planning.decide import in_scope
from surgery.planning.formats import GGUF
from surgery.planning.layouts import layout_rule
from surgery.planning.methods import find_method
from surgery.planning.protect import protect_list
from surgery.planning.sizes import count_text, named_dtype, read_config, size_text
from surgery.planning.target import BYTES, BYTES_OF, Target, parse_target
from surgery.planning.written import field_groups, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.formats import FileBytes
    from surgery.planning.options import PlanOptions

_DIGITS = (2, 3, 4)
"""Decimals of a sparsity that are tried, so that people can type the sparsity that was found."""


@dataclass(frozen=True)
class Sized:
    """What a target comes to.

    Attributes:
        target: The target.
        sparsity: Share of the channels to remove.
        before, after: Parameters of the model, and of the result as it will be written.
        each: Bytes of a parameter in the result.
        dtype: Dtype of the result.
        file_bytes: Bytes of the result's file, if the target is one in bytes and the file's tensors do not all have one dtype;
            otherwise None.
    """

    target: Target
    sparsity: float
    before: int
    after: int
    each: int
    dtype: str
    file_bytes: int | None = None

    def __str__(self) -> str:
        size = f", {size_text(self.after * self.each)} in {self.dtype}" if self.target.kind == BYTES else ""
        if self.file_bytes is not None:
            size = f", a file of at most {size_text(self.file_bytes)}"
        return (
            f"--to {self.target.text} comes to a sparsity of {self.sparsity:.6g}: {count_text(self.before)} to "
            f"{count_text(self.after)} parameters ({self.after / self.before:.1%}){size}"
        )


def stored_dtype(atlas: Atlas, asked: str | None = None) -> str:
    """The dtype of a result's weights: ``asked``, or what the config of the model says, or the measured dtype.

    Raises:
        UsageError: ``asked`` is not a dtype.
    """
    if asked is not None:
        if asked not in BYTES_OF:
            raise unknown("dtype", asked, BYTES_OF)
        return asked
    return named_dtype(read_config(atlas.model.config)) or (atlas.model.dtype if atlas.model.dtype in BYTES_OF else "float32")


def sized(atlas: Atlas, options: PlanOptions) -> Sized:
    """Find the sparsity whose result is at the target ``options.to`` or just below it.

    Raises:
        UsageError: No cut of FFNs reaches the target, or the target removes nothing, or another option has no meaning.
        AtlasError: The atlas does not say how many parameters a channel has, or lacks what the method needs.
    """
    assert options.to is not None
    target = parse_target(options.to)
    if options.invert:
        raise UsageError("--to and --invert cannot be combined", hint="use --sparsity with --invert")
    before = atlas.model.parameters
    if not before or not all(block.channel_parameters for block in atlas.blocks):
        raise AtlasError(
            f"{atlas.path} does not say how many parameters a channel has, so no size can be computed",
            hint="use --sparsity, or build the atlas again with: atlas build",
        )
    measure = _measure(atlas, options, target)
    blocks = in_scope(atlas, options)
    selectors = tuple(dict.fromkeys((*find_method(options.method).always_protects, *options.protect)))
    scores = Scores(atlas, options.method, options.seed, blocks)
    choice = Choice(scores, options, protect_list(selectors, atlas, options.unprotect).masks)
    groups = field_groups(atlas.blocks)
    rule = layout_rule(options.layout, atlas.blocks, read_config(atlas.model.config))
    rule.check()

    def written(sparsity: float) -> tuple[list[int], list[int]]:
        """Channels that each FFN keeps, and its width in the result. Raises `UsageError` as `Choice.widths`."""
        widths = choice.widths(sparsity)
        kept = [widths.get(block.index, block.n_channels) for block in atlas.blocks]
        return kept, rule.widths(atlas.blocks, kept, options.multiple_of, groups)[1]

    def after(sparsity: float) -> int:
        """The result's size, as the target counts it."""
        return measure.after(*written(sparsity))

    widest, narrowest = max(block.n_channels for block in blocks), min(block.n_channels for block in blocks)
    first = -(-widest // narrowest)
    most = _largest(first, widest - 1, lambda count: _fits(after, count / widest))
    if after(most / widest) > measure.wanted:
        raise _unreachable(measure, options, measure.parameters(*written(most / widest)), after(most / widest))
    # The number of removed channels of the widest FFN, from which on the result is small enough.
    count = 1 + _largest(first - 1, most - 1, lambda count: count < first or after(count / widest) > measure.wanted)
    found = after(count / widest)
    widths = choice.widths(count / widest)
    reached = 1 - sum(widths[block.index] * len(block.experts) for block in blocks) / sum(
        block.n_channels * len(block.experts) for block in blocks
    )
    sparsity = next(
        (short for digits in _DIGITS if _same(after, short := round(reached, digits), found)),
        count / widest,
    )
    parameters = measure.parameters(*written(sparsity))
    return Sized(target, sparsity, before, parameters, measure.each, measure.dtype, None if measure.file is None else found)


@dataclass(frozen=True)
class _Measure:
    """How a target counts sizes: in parameters, or in the bytes of a file.

    Attributes:
        target: The target.
        blocks: The model's FFNs.
        before: Parameters of the model.
        each, dtype: As in `Sized`.
        file: What counts the bytes; None to count parameters.
    """

    target: Target
    blocks: Sequence[Block]
    before: int
    each: int
    dtype: str
    file: FileBytes | None

    @property
    def wanted(self) -> int:
        """The largest size that is not above the target."""
        return self.target.parameters(self.before, self.each) if self.file is None else math.floor(self.target.amount)

    @property
    def uncut(self) -> int:
        """Size of the model if nothing is cut."""
        return self.before if self.file is None else self.file.after([block.n_channels for block in self.blocks])

    def parameters(self, kept: Sequence[int], widths: Sequence[int]) -> int:
        """Parameters of a result whose FFNs keep ``kept`` channels and are ``widths`` wide."""
        size = size_of(self.blocks, kept, widths)
        assert size is not None
        return self.before - size.written

    def after(self, kept: Sequence[int], widths: Sequence[int]) -> int:
        """Size of that result, as the target counts it."""
        return self.parameters(kept, widths) if self.file is None else self.file.after(widths)

    def text(self, parameters: int, size: int) -> str:
        """The bytes of a result for people, after a comma; empty if the target does not count bytes."""
        if self.target.kind != BYTES:
            return ""
        return f"{size_text(parameters * self.each)} in {self.dtype}" if self.file is None else f"a file of {size_text(size)}"


def _measure(atlas: Atlas, options: PlanOptions, target: Target) -> _Measure:
    """How ``target`` counts. Raises `UsageError` if nobody can count so, or if the target removes nothing."""
    file = None
    if target.kind == BYTES and options.format == GGUF:
        file = options.file_bytes
        if file is None:
            raise UsageError(
                f"--to {target.text} counts the bytes of a GGUF file, and its types are those of the source",
                hint="add --model FILE.gguf, or ask for parameters, such as --to 75%",
            )
    dtype, before = stored_dtype(atlas, options.dtype), atlas.model.parameters
    measure = _Measure(target, atlas.blocks, before, BYTES_OF[dtype], dtype, file)
    if measure.wanted >= measure.uncut:
        size = measure.text(before, measure.uncut)
        raise UsageError(
            f"--to {target.text} removes nothing: the model has {count_text(before)} parameters{size and f' ({size})'}",
            hint="ask for less",
        )
    return measure


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from ``low`` to ``high`` for which ``holds``, which holds for ``low`` and no more from some number on."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fits(after: Callable[[float], int], sparsity: float) -> bool:
    try:
        after(sparsity)
    except UsageError:
        return False
    return True


def _same(after: Callable[[float], int], sparsity: float, parameters: int) -> bool:
    return 0 < sparsity < 1 and _fits(after, sparsity) and after(sparsity) == parameters


def _unreachable(measure: _Measure, options: PlanOptions, parameters: int, size: int) -> UsageError:
    """The error for a target below the smallest size that FFN pruning reaches."""
    target, before = measure.target, measure.before
    in_bytes = measure.text(parameters, size)
    limits = [
        *(["use --allocation uniform"] if options.allocation == "global" else []),
        *([f"leave out {' and '.join(names)}"] if (names := _limiting(options)) else []),
        *(["add --dtype bfloat16"] if target.kind == BYTES and measure.file is None and measure.each > 2 else []),
    ]
    if parameters == before:
        limits = limits or ["use --allocation uniform"]
    else:
        smallest = target.spelled(parameters, before, measure.each) if measure.file is None else target.spelled(size, before, 1)
        limits.insert(0, f"use --to {smallest}")
    return UsageError(
        f"--to {target.text} cannot be reached by removing FFN channels: the smallest result with these options has "
        f"{count_text(parameters)} of {count_text(before)} parameters ({parameters / before:.1%}{in_bytes and f', {in_bytes}'})",
        hint=", or ".join(limits),
    )


def _limiting(options: PlanOptions) -> list[str]:
    given = {"--layers": options.layers, "--stack": options.stack, "--protect": options.protect}
    return [name for name, value in given.items() if value]
