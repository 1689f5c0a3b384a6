"""What a cut is asked to be: the options of a plan, their defaults and their ranges."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Integral

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from surgery.planning.formats import FORMATS, SAFETENSORS, FileBytes, check_layout_of_format
from surgery.planning.layouts import AUTO, LAYOUTS
from surgery.planning.methods import METHODS, find_method
from surgery.planning.selectors import SYNTAX
from surgery.planning.target import SYNTAX as TARGETS
from surgery.planning.target import parse_target
from surgery.planning.width import check_sparsity

ALLOCATIONS = ("uniform", "global")
"""Ways to share the removal among the FFNs."""
MAX_LAYER_SPARSITY = 0.7
"""Largest share of an FFN that global allocation removes, unless the options name another."""


_SPELLINGS = dict.fromkeys(("protect", "unprotect"), f"write {SYNTAX}") | {"stack": "write the name of a stack, such as decoder"}


@dataclass(frozen=True)
class PlanOptions:
    """What to cut.

    Either ``sparsity`` or ``to`` says how much goes. ``protect``, ``unprotect`` and ``stack`` take one text, or any iterable
    of texts. ``layers`` takes numbers, too. ``dtype`` is that of the result, for a ``to`` in bytes; None for the model's.
    ``format`` is one of `surgery.planning.formats.FORMATS`, and ``file_bytes`` says how large a file in it will be; None if
    nobody knows.

    Raises:
        UsageError: One of these fields holds something else.
    """

    sparsity: float | None = field(
        default=None,
        metadata={"help": "share of the FFN channels to remove, such as 0.5; or give --to", "metavar": "S"},
    )
    method: str = field(
        default="scar-prot",
        metadata={"help": f"score that ranks the channels: {', '.join(METHODS)}", "metavar": "METHOD"},
    )
    protect: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": f"channels that are never removed; repeat for the union of several: {SYNTAX.replace('%', '%%')}",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    unprotect: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "channels that may be removed although --protect or the method protects them, in the same syntax; repeat for more",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "uniform: remove the same share of every FFN; global: remove the lowest scores of all FFNs together",
            "choices": ALLOCATIONS,
        },
    )
    max_layer_sparsity: float | None = field(
        default=None,
        metadata={
            "help": f"largest share of one FFN that --allocation global removes (default: {MAX_LAYER_SPARSITY})",
            "metavar": "S",
        },
    )
    layers: str | None = field(
        default=None,
        metadata={
            "help": "cut only these layers, such as 0-7,12; the other layers keep every channel",
            "metavar": "LAYERS",
        },
    )
    stack: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "cut only the FFNs of this stack; repeat for more",
            "metavar": "NAME",
            "repeat": True,
        },
    )
    invert: bool = field(
        default=False,
        metadata={
            "help": "remove exactly the channels that would be kept, and keep the others",
        },
    )
    multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "round kept widths to a multiple of N (default: the largest of 256, 128 and 64 that moves the kept width by less than 2%%, or 32)",
            "metavar": "N",
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the method random"})
    to: str | None = field(
        default=None,
        metadata={
            "help": f"size of the result, in place of --sparsity: {TARGETS.replace('%', '%%')}",
            "metavar": "SIZE",
        },
    )
    # Commands that write a result have an option of this name already, so it has no help text here.
    dtype: str | None = None
    layout: str = field(
        default=AUTO,
        metadata={
            "help": "config of a result with uneven widths; " + "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items()),
            "choices": tuple(LAYOUTS),
        },
    )
    # As for dtype.
    format: str = SAFETENSORS
    file_bytes: FileBytes | None = None

    def __post_init__(self) -> None:
        for name in ("protect", "unprotect", "stack"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str | os.PathLike | int) else tuple(value or ())
            for text in texts:
                if not isinstance(text, str | os.PathLike):
                    raise UsageError(f"--{name} takes text, not {text!r}", hint=_SPELLINGS[name])
            object.__setattr__(self, name, tuple(os.fspath(text) for text in texts))
        if self.layers is not None and not isinstance(self.layers, str):
            numbers = (self.layers,) if isinstance(self.layers, Integral) else tuple(self.layers)
            object.__setattr__(self, "layers", ",".join(map(str, numbers)))

    @property
    def share(self) -> float:
        """Share of the channels to remove, if the options name it."""
        assert self.sparsity is not None
        return self.sparsity

    def check(self) -> None:
        """Raise `UsageError` for a value outside its range."""
        if self.sparsity is None and self.to is None:
            raise UsageError(
                "nothing says how much to remove", hint="add --sparsity 0.5 (a share of the channels) or --to 75% (a size)"
            )
        if self.sparsity is not None and self.to is not None:
            raise UsageError("--sparsity and --to both say how much to remove", hint="leave out one of them")
        if self.to is not None:
            parse_target(self.to)
        else:
            check_sparsity(self.share)
        find_method(self.method)
        if self.seed < 0:
            raise UsageError(f"--seed must be 0 or more, not {self.seed}")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UsageError(f"--multiple-of must be at least 1, not {self.multiple_of}")
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        check_layout_of_format(self.format, self.layout)
        if self.max_layer_sparsity is None:
            return
        if self.allocation == "uniform":
            raise UsageError("--max-layer-sparsity has no effect if all FFNs lose the same share", hint="add --allocation global")
        if not 0 < self.max_layer_sparsity <= 1:
            raise UsageError(f"--max-layer-sparsity must be above 0 and at most 1, not {self.max_layer_sparsity:g}")
