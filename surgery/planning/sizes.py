"""What a cut makes of a model's size, in words: parameters, bytes, and the config that is written. The same words everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.parsed import parse_json
from chanfmt.base.text import one_line
from surgery.planning.layouts import CUSTOM, DECI, UNIFORM, custom_changes, deci_changes
from surgery.planning.target import BYTES_OF
from surgery.planning.written import written_widths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from surgery.planning.written import Linked

_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3))
_HIGHEST = 1e15
"""Values of a config field above this one are not believed."""
_FEW = 3
"""Config fields that a headline names; it counts further ones."""


@dataclass(frozen=True)
class Sizes:
    """A model before and after a cut.

    Attributes:
        parameters: Parameters before and after, as written: zero channels count.
        bytes: Bytes of the tensors before and after; None if they are not known.
        config: Config fields that change, in words, such as ``intermediate_size 1536 to 768``.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int] | None = None
    config: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """All of it in one line: ``134.5M to 94.7M parameters, -29.6%; 538.1 MB to 378.8 MB; intermediate_size 1536 to 768``."""
        return "; ".join([parameters_text(*self.parameters), *self.details])

    @property
    def details(self) -> list[str]:
        """The headline's parts after the parameters."""
        more = len(self.config) - _FEW
        shown = list(self.config if more <= 0 else [*self.config[:_FEW], f"{more} more config fields"])
        return [*([bytes_text(*self.bytes)] if self.bytes else []), *([", ".join(shown)] if shown else [])]

    @property
    def rows(self) -> list[list[str]]:
        """The headline as pairs of a quantity and its value, for a list of such pairs."""
        before, after = self.parameters
        rows = [["parameters", f"{parameters_text(before, after, noun='')} ({before:,} to {after:,})"]]
        if self.bytes:
            rows.append(["size", bytes_text(*self.bytes)])
        if self.config:
            rows.append(["config", ", ".join(self.config)])
        return rows


def parameters_text(before: int, after: int, noun: str = " parameters") -> str:
    """Such as ``134.5M to 94.7M parameters, -29.6%``."""
    return f"{count_text(before)} to {count_text(after)}{noun}, {change_text(before, after)}"


def bytes_text(before: int, after: int) -> str:
    """Such as ``538.1 MB to 378.8 MB``."""
    return f"{size_text(before)} to {size_text(after)}"


def change_text(before: int, after: int) -> str:
    """A relative change in percent, such as ``-29.6%``; in words if there is none."""
    return f"{after / before - 1:+.1%}" if before and after != before else "no smaller"


def count_text(count: int) -> str:
    """A number of parameters in four digits or fewer: ``134.5M``, ``8.03B``, ``512``."""
    # A number just below a unit would round up to 1000 of the unit below.
    for unit, size in _UNITS:
        if count >= 0.9995 * size:
            value = count / size
            return f"{value:.{2 if value < 10 and size >= 1e9 else 1}f}{unit}"
    return str(count)


def size_text(count: int) -> str:
    """Bytes in decimal units: ``378.8 MB``, ``16.06 GB``."""
    if count >= 999.95e6:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 999_950 else f"{count / 1e3:.1f} kB"


def planned_sizes(
    blocks: Sequence[Linked],
    widths: Sequence[int],
    before: int,
    after: int,
    config: Mapping[str, Any] | None,
    layout: str = UNIFORM,
) -> Sizes:
    """Sizes of a cut that is not made yet.

    Args:
        widths: Width of each FFN in the result.
        before, after: Parameters before and after the cut.
        config: The model's config. The float type of the checkpoint and the changed fields follow from it; None if it is not
            known.
        layout: How the result is laid out.
    """
    each = stored_bytes(config or {})
    size = (before * each, after * each) if each else None
    changes = deci_changes(config or {}, widths) if layout == DECI else config_changes(blocks, widths, config or {})
    if layout == CUSTOM:
        shared = written_widths(blocks, widths)
        narrower = [width for width, field in zip(widths, shared, strict=True) if width < field]
        changes = (*custom_changes(narrower), *config_changes(blocks, shared, config or {}))
    return Sizes((before, after), size, changes)


def read_config(text: str) -> dict[str, Any]:
    """The config that an atlas holds as ``text``; empty if it is not a JSON object of finite numbers."""
    try:
        return parse_json(text, dict)
    except ValueError:
        return {}


def stored_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a parameter in a checkpoint with this config; 0 if the config does not say."""
    name = named_dtype(config)
    return 0 if name is None else BYTES_OF[name]


def named_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a model's config, or a part of it, names for its weights; None if it names no dtype of `BYTES_OF`."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str) and name in BYTES_OF:
            return name
    return None


def config_changes(blocks: Sequence[Linked], widths: Sequence[int], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The config fields that a cut to ``widths`` changes, in words, in model order."""
    fields: dict[str, list[tuple[float | None, float | None]]] = {}
    seen: set[str] = set()
    for block, width in zip(blocks, widths, strict=True):
        if not block.width_field or width == block.n_channels or block.width_field in seen:
            continue
        seen.add(block.width_field)
        path, _, place = block.width_field.partition("[")
        now = _value(config, path, place)
        units, left = block.n_channels // block.width_factor, width // block.width_factor
        # A field may hold a multiple of the width or a ratio: the same proportion stays.
        fields.setdefault(path, []).append((units, left) if now is None else (now, _scaled(now, left, units)))
    return tuple(_change(path, changes) for path, changes in fields.items())


def applied_changes(fields: Mapping[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """As `config_changes`, for the values of fields before and after a cut that was made."""
    return tuple(_applied(path, before, after) for path, (before, after) in fields.items())


def _applied(path: str, before: Any, after: Any) -> str:
    if isinstance(after, list):
        old = before if isinstance(before, list) and len(before) == len(after) else [before] * len(after)
        return _change(path, [pair for pair in zip(old, after, strict=True) if pair[0] != pair[1]])
    return _change(path, [(before, after)])


def _change(path: str, changes: Sequence[tuple[Any, Any]]) -> str:
    several = set(changes)
    name = one_line(path, 80)
    if len(several) == 1:
        before, after = changes[0]
        return f"{name} {_plain(before)} to {_plain(after)}"
    lows = [after for _, after in changes if isinstance(after, int | float)]
    between = f", now {_plain(min(lows))} to {_plain(max(lows))}" if lows else ""
    return f"{len(changes)} values of {name}{between}"


def _plain(value: Any) -> str:
    # People type widths back, so they have no separators.
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "unset"}[value]
    return f"{value:.6g}" if isinstance(value, float) else one_line(str(value), 40)


def _value(config: Mapping[str, Any], path: str, place: str) -> float | None:
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    if place and isinstance(found, list) and place[:-1].isdigit() and int(place[:-1]) < len(found):
        found = found[int(place[:-1])]
    # The config of an atlas may say anything.
    known = isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < _HIGHEST
    return found if known else None


def _scaled(value: float, left: int, units: int) -> float:
    scaled = value * left / units
    return int(scaled) if isinstance(value, int) and scaled.is_integer() else scaled
