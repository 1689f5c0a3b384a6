"""What becomes of each tensor of a checkpoint: the class loads it, lists it as ignorable, or it is named and refused.

transformers says nothing about a tensor that it has no place for, and gives random numbers to a parameter that it finds
no tensor for. Both would be measured, and cut, without a word. The accounting is made from the headers of the files and
from a model without numbers, before any weight is read. transformers' own loading code runs on the shapes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.narrate import say
from chanfmt.models.classes import auto_class, shapes_only
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.source import check_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from chanfmt.models.safetensors import CheckpointIndex, TensorEntry
    from chanfmt.models.source import ModelSource

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"})
_DRAFT = re.compile(r"(^|[._])(mtp|nextn|medusa|eagle|draft|speculator)", re.IGNORECASE)
_ROTARY = re.compile(r"(^|\.)rotary\w*\.(inv_freq|cos_cached|sin_cached)$")
_INCOMPLETE = "a model with random weights cannot be measured; is this the complete checkpoint?"
_CHUNK = 64 << 20


@dataclass(frozen=True)
class Refusal:
    """A reason why a checkpoint cannot be measured or cut.

    Attributes:
        tensor: Name of the tensor in the files; of the parameter, if the files hold no tensor for it.
        reason: What is wrong, as a sentence that names the tensor.
        hint: What to do next.
    """

    tensor: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Unloaded:
    """Tensors that the class does not load, under one prefix. A server may load them.

    Attributes:
        prefix: What their names have in common, up to the first number: ``mtp.layers.0``, ``model.layers.61``, ``score``.
        tensors: Their names in the files.
        like: Prefix of the last loaded block that has a tensor of the same name and shape for most of the matrices here:
            ``model.layers.3`` for ``mtp.layers.0``. Empty if there is none.
        head: Whether another transformers class of the same model type loads them, such as a classification head.
    """

    prefix: str
    tensors: tuple[str, ...]
    like: str
    head: bool


@dataclass(frozen=True)
class Accounting:
    """What becomes of each tensor of a checkpoint.

    Attributes:
        kind: Name of the class that loads the checkpoint.
        loaded: Tensors that the class loads.
        ignored: Tensors that the class lists as ignorable, and heads that another class of the same model type loads. They
            are not measured. A cut must carry them, cut them too, or refuse.
        refused: Everything that must not be ignored. Empty for a checkpoint that can be measured.
        unloaded: The tensors of ``ignored``, grouped by prefix; buffers that are computed anew, such as ``inv_freq``, are
            left out.
    """

    kind: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    refused: tuple[Refusal, ...]
    unloaded: tuple[Unloaded, ...]

    def notes(self) -> list[str]:
        """What a user should know of `unloaded`, one sentence for each family of groups."""
        families: dict[str, list[str]] = defaultdict(list)
        for group in self.unloaded:
            families[_family(group.prefix, self.loaded)] += group.tensors
        return [
            f"{self.kind} does not load {family}.*: {len(names)} tensors; they are not measured"
            if len(names) > 1
            else f"{self.kind} does not load {names[0]}; it is not measured"
            for family, names in families.items()
        ]


def check_accounted(source: ModelSource) -> Accounting:
    """Account for every tensor of ``source``, and note what its class does not load.

    Raises:
        ModelError: A tensor must be refused, or a parameter gets no values. The error names the tensor.
    """
    accounting = account(source)
    if accounting.refused:
        first, more = accounting.refused[0], len(accounting.refused) - 1
        others = f" ({more} more {'tensor is' if more == 1 else 'tensors are'} refused)" if more else ""
        raise ModelError(f"{source.id}: {first.reason}{others}", hint=first.hint)
    for note in accounting.notes():
        say(note)
    if unused := source.index.unused:
        such = f" (and {len(unused) - 1} more such files)" if len(unused) > 1 else ""
        say(f"{unused[0]}{such} does not belong to the checkpoint in use, and is not read")
    return accounting


def account(source: ModelSource) -> Accounting:
    """What becomes of each tensor in the files of ``source``. No weights are read, except of tied tensors that are stored twice.

    Raises:
        ModelError: transformers does not know the model, the checkpoint cannot be read, or as
            `chanfmt.models.source.check_plain`.
    """
    check_plain(source)
    model = shapes_only(auto_class(source.config), source.config, trust_remote_code=source.trust_remote_code)
    return account_for(model, source.index)


def account_for(model: Any, index: CheckpointIndex) -> Accounting:
    """What becomes of each tensor of ``index`` in ``model``, a model on the meta device. It is of no use afterwards."""
    return _Account(model, index).result()


@dataclass(frozen=True)
class Place:
    """Where transformers loads a stored tensor.

    Attributes:
        target: Name in the model. If the tensor becomes several in the model, the first of them.
        pattern: The source pattern of transformers' converter that takes the tensor; None if it is loaded as it is.
        number: Position of the tensor in the list that the converter joins, such as the number of an expert; None if it has none.
    """

    target: str
    pattern: str | None
    number: int | None = None


def places(model: Any, mapping: list[Any], names: Iterable[str]) -> dict[str, Place]:
    """Stored tensor to its place in ``model``, which need not exist there.

    Args:
        model: A transformers model; its parameters may be on the meta device.
        mapping: `transformers.conversion_mapping.get_model_conversion_mapping` of the model.
        names: Names of the stored tensors.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Place] = {}
    # A renaming may depend on the names before, so the order is that of transformers.
    for stored in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if target not in known and stored in known:
            target, pattern = rename_source_key(stored, [], [], prefix, known)
        number = None if pattern is None else _number(pattern, apply_renamings(stored, renamings))
        found[stored] = Place(target, pattern, number)
    return found


def _number(pattern: str, name: str) -> int | None:
    """The number that stands in ``name`` for the star of ``pattern``; None if there is no star."""
    if pattern.count("*.") != 1:
        return None
    match = re.search(pattern.replace("*.", r"(?P<number>\d+)\."), name)
    return int(match["number"]) if match else None


class _Account:
    def __init__(self, model: Any, index: CheckpointIndex) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self.index = index
        self.kind = type(model).__name__
        self.state = dict(model.state_dict(keep_vars=True))
        self.mapping = get_model_conversion_mapping(model)
        self.placed = places(model, self.mapping, index.tensors)
        self.sources: dict[str, list[str]] = defaultdict(list)
        """Name in the model to the stored tensors that are listed under it."""
        self.unknown: list[str] = []
        for stored, place in self.placed.items():
            if place.target in self.state:
                self.sources[place.target].append(stored)
            else:
                self.unknown.append(stored)

    def result(self) -> Accounting:
        ignorable = self._ignorable()
        left = [name for name in self.unknown if name not in ignorable]
        heads = _of_other_classes(self.model, self.index, left) if left else set()
        refused = [
            *(self._unknown(name) for name in left if name not in heads),
            *self._doubled(),
            *self._other_kinds(),
            *self._shapes(),
            *self._untied(),
        ]
        bad = {refusal.tensor for refusal in refused}
        ignored = sorted(ignorable | heads)
        return Accounting(
            self.kind,
            tuple(name for name in self.placed if name not in bad and self.placed[name].target in self.state),
            tuple(ignored),
            tuple(refused),
            tuple(self._grouped(ignored, heads)),
        )

    def _ignorable(self) -> set[str]:
        """The unknown tensors that the class itself says may be ignored, or computes anew: buffers that files once held."""
        targets = {self.placed[name].target for name in self.unknown}
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=targets)
        self.model._adjust_missing_and_unexpected_keys(info)
        computed = {name for name, _ in self.model.named_buffers()}
        return {
            name
            for name in self.unknown
            if (target := self.placed[name].target) not in info.unexpected_keys
            or target in computed
            or _is_mask(name, self.index.tensors[name].shape)
            or _ROTARY.search(name)
        }

    def _unknown(self, name: str) -> Refusal:
        stem, _, leaf = name.rpartition(".")
        if self._beyond(name):
            return Refusal(
                name,
                f"the checkpoint holds {name}, a layer that its config does not have",
                "a model measured in part would be cut in part; repair num_hidden_layers in config.json",
            )
        reason = f"the checkpoint holds {name}, which {self.kind} has no place for and would ignore"
        if "scale" in leaf or "zero_point" in leaf:
            hint = "it looks like a scale of quantised weights; use the unquantised checkpoint that this one was made from"
        elif _DRAFT.search(name):
            hint = (
                "it looks like a layer for speculative decoding; remove such tensors from the checkpoint (and their fields "
                "from config.json), or use a transformers version whose class loads or ignores them"
            )
        elif leaf == "bias" and f"{stem}.weight" in self.placed:
            hint = (
                "the model would run without this bias, and be another model; set the config field that gives the class its "
                "biases (such as mlp_bias or attention_bias), or use the checkpoint from before the biases were added"
            )
        else:
            hint = (
                "a model measured without this tensor may be another model; remove the tensor if nothing needs it, or name "
                "the class that loads it under architectures in config.json"
            )
        return Refusal(name, reason, hint)

    def _beyond(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to an element beyond the end of a layer list of the model."""
        parts = self.placed[name].target.split(".")
        for at, part in enumerate(parts):
            if part.isdigit():
                for prefix in ("", f"{self.model.base_model_prefix}."):
                    try:
                        layers = self.model.get_submodule(prefix + ".".join(parts[:at]))
                    except AttributeError:
                        continue
                    return hasattr(layers, "__len__") and int(part) >= len(layers)
        return False

    def _doubled(self) -> Iterator[Refusal]:
        """Parameters that two stored tensors claim, and lists of experts with a gap or with one too many."""
        for target, stored in self.sources.items():
            patterns: dict[str | None, list[str]] = defaultdict(list)
            for name in stored:
                patterns[self.placed[name].pattern].append(name)
            if None in patterns and len(stored) > 1:
                yield _twice(target, stored)
                continue
            yield from self._misnumbered(target, [names for pattern, names in patterns.items() if pattern is not None])
        yield from self._produced_twice()

    def _misnumbered(self, target: str, lists: list[list[str]]) -> Iterator[Refusal]:
        """Gaps and repetitions in the lists that a converter joins to ``target``, such as the gates of all experts."""
        numbered = [[self.placed[name].number for name in names] for names in lists]
        held = {number: name for names in lists for name in names if (number := self.placed[name].number) is not None}
        last = max(held, default=-1)
        for names, numbers in zip(lists, numbered, strict=True):
            if numbers == [None]:
                continue
            if len(set(numbers)) < len(numbers):
                yield _twice(target, [name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1])
            for number in sorted(set(range(last + 1)) - set(numbers)):
                name = f".{number}.".join(names[0].rsplit(f".{numbers[0]}.", 1))
                yield Refusal(
                    name,
                    f"the checkpoint lacks {name}, and holds {held[last]}",
                    "without it, the tensors would be joined in the wrong order; is this the complete checkpoint?",
                )
            if numbers != sorted(numbers, key=lambda number: -1 if number is None else number):
                stems = {name: "..".join(name.rsplit(f".{self.placed[name].number}.", 1)) for name in names}
                counts = Counter(stems.values())
                odd = min(names, key=lambda name: counts[stems[name]])
                yield Refusal(
                    odd,
                    f"the checkpoint holds {odd} under another prefix than the tensors that it is joined with to {target}",
                    "transformers sorts the tensors by their names, and would join them in the wrong order; rename the tensor",
                )

    def _produced_twice(self) -> Iterator[Refusal]:
        """Tensors that are stored both as they are and as a part of what a converter splits."""
        several = {
            pattern: entry.target_patterns
            for entry in self.mapping
            if hasattr(entry, "operations") and len(entry.target_patterns) > 1
            for pattern in entry.source_patterns
        }
        for target, stored in list(self.sources.items()):
            pattern = self.placed[stored[0]].pattern
            for other in several.get(pattern or "", ())[1:]:
                twin = target.replace(several[pattern or ""][0], other)
                if twin != target and twin in self.sources:
                    yield _twice(twin, [stored[0], *self.sources[twin]])

    def _other_kinds(self) -> Iterator[Refusal]:
        """Floating parameters that are stored as integers or in 8 bits, and the other way round."""
        for target, stored in self.sources.items():
            wanted = self.state[target]
            floating = not hasattr(wanted, "is_floating_point") or wanted.is_floating_point()
            for name in stored:
                dtype = self.index.tensors[name].dtype
                if dtype not in (_FLOATS if floating else _INTEGERS):
                    kind = "floating-point numbers" if floating else "integers"
                    yield Refusal(
                        name,
                        f"the checkpoint stores {name} as {dtype}, and {self.kind} has {kind} there",
                        "a quantised weight is not measured; use the unquantised checkpoint that this one was made from",
                    )

    def _shapes(self) -> Iterator[Refusal]:
        """Tensors of another shape than the class has, and parameters that no tensor gives values to."""
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        described = {name: _Described(entry) for name, entry in self.index.tensors.items()}
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        dtype = torch.float32
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                described,
                LoadStateDictConfig(
                    dtype=dtype,
                    dtype_plan=self.model._get_dtype_plan(dtype),
                    weight_mapping=self.mapping,
                    device_map={"": torch.device("meta")},
                ),
            )
        for target, found, wanted in sorted(info.mismatched_keys, key=str):
            names = self.sources.get(target, [target])
            number = self.placed[names[-1]].number if names[-1] in self.placed else None
            if number is not None and found[:1] == (number + 1,) and found[0] < wanted[0] and found[1:] == wanted[1:]:
                name = f".{number + 1}.".join(names[-1].rsplit(f".{number}.", 1))
                yield Refusal(name, f"the checkpoint lacks {name}, the next of {number + 1} for {target}", _INCOMPLETE)
                continue
            odd = self._odd(names)
            part = odd if len(names) == 1 else f"{odd} and {len(names) - 1} more, together {target},"
            yield Refusal(
                odd,
                f"the checkpoint holds {part} with the shape {list(found)}, and {self.kind} needs {list(wanted)}",
                "config.json and the weights do not belong together; download the checkpoint again, or repair the config",
            )
        for target in sorted(info.conversion_errors):
            odd = self._odd(self.sources.get(target, [target]))
            shape = f" of the shape {list(self.index.tensors[odd].shape)}" if odd in self.index.tensors else ""
            yield Refusal(
                odd,
                f"the checkpoint holds {odd}{shape}, which transformers cannot convert to {target} of {self.kind}",
                "it does not fit the tensors that it is joined with; is this the complete checkpoint?",
            )
        broken = {key for key, *_ in info.mismatched_keys} | set(info.conversion_errors)
        missing = self._without_values(set(info.missing_keys) - broken, ties)
        for name in sorted(missing):
            yield Refusal(name, f"the checkpoint lacks {name}, which {self.kind} needs", _INCOMPLETE)

    def _odd(self, names: list[str]) -> str:
        """The tensor in ``names`` whose shape is the rarest among those that a converter joins with it."""
        lists: dict[str | None, list[str]] = defaultdict(list)
        for name in names:
            if name in self.placed:
                lists[self.placed[name].pattern].append(name)
        for joined in lists.values():
            shapes = Counter(self.index.tensors[name].shape for name in joined)
            if len(shapes) > 1:
                return min(joined, key=lambda name: shapes[self.index.tensors[name].shape])
        return names[0]

    def _without_values(self, missing: set[str], ties: Mapping[str, str]) -> set[str]:
        """The names in ``missing`` that neither a tie nor the class's own rule gives values to."""
        groups: dict[str, set[str]] = defaultdict(set)
        for target, origin in ties.items():
            groups[origin] |= {target, origin}
        tied = {name for group in groups.values() if group - missing for name in group}
        # Modules of a repository's own code may share a parameter under several names.
        shared = {id(tensor) for name, tensor in self.state.items() if name not in missing and tensor is not None}
        missing = {name for name in missing - tied if id(self.state[name]) not in shared}
        # If all of a group are missing, the files lack the tensor that the others are tied to.
        missing -= {target for target, origin in ties.items() if origin in missing}
        patterns = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        return {name for name in missing if not (any(re.search(pattern, name) for pattern in patterns) and self._computed(name))}

    def _computed(self, name: str) -> bool:
        """Whether the class itself computes the values of ``name``: a buffer, a constant, or a table that is not trained."""
        import torch

        tensor = self.state[name]
        return not isinstance(tensor, torch.nn.Parameter) or tensor.ndim < 2 or not tensor.requires_grad

    def _untied(self) -> Iterator[Refusal]:
        """Tensors that the config ties and the files hold several times, with different values."""
        for target, origin in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            stored = [self.sources.get(name, []) for name in (target, origin)]
            if not all(stored) or stored[0] == stored[1]:
                continue
            entries = [[self.index.tensors[name] for name in names] for names in stored]
            same = len(entries[0]) == len(entries[1]) and all(
                _same_values(one, other) for one, other in zip(*entries, strict=True)
            )
            if not same:
                name, other = stored[0][0], stored[1][0]
                yield Refusal(
                    name,
                    f"the config ties {name} to {other}, and the checkpoint holds both with different values",
                    "programs differ in which of the two they use; set tie_word_embeddings to false in config.json if both are "
                    "meant, or remove one of the tensors",
                )

    def _grouped(self, ignored: list[str], heads: set[str]) -> Iterator[Unloaded]:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in ignored:
            groups[_prefix(name)].append(name)
        loaded: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name in self.placed:
            if self.placed[name].target in self.state:
                prefix = _prefix(name)
                loaded[prefix][name.removeprefix(prefix)] = self.index.tensors[name].shape
        for prefix, names in groups.items():
            if any(self._is_weight(name) for name in names):
                yield Unloaded(prefix, tuple(names), self._like(prefix, names, loaded), any(name in heads for name in names))

    def _is_weight(self, name: str) -> bool:
        entry = self.index.tensors[name]
        return entry.dtype in _FLOATS and (name.endswith("weight") or 2 <= len(entry.shape) <= 3)

    def _like(self, prefix: str, names: list[str], loaded: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
        matrices = [name for name in names if len(self.index.tensors[name].shape) > 1]
        best, most = "", 0
        for other, shapes in loaded.items():
            if not other[-1:].isdigit():
                continue
            count = sum(shapes.get(name.removeprefix(prefix)) == self.index.tensors[name].shape for name in matrices)
            if count >= most:
                best, most = other, count
        return best if 2 * most > len(matrices) else ""


def _of_other_classes(model: Any, index: CheckpointIndex, names: list[str]) -> set[str]:
    """The tensors in ``names`` that another class for the same config loads, in the shapes that it has: heads and poolers."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.models.auto import modeling_auto

    candidates = {str(name) for name in model.config.architectures or ()}
    for mapping, classes in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_NAMES"):
            value = classes.get(model.config.model_type, ())
            candidates |= {value} if isinstance(value, str) else set(value)
    found: set[str] = set()
    for candidate in sorted(candidates - {type(model).__name__}):
        other = getattr(transformers, candidate, None)
        if not hasattr(other, "_from_config") or len(found) == len(names):
            continue
        try:
            built = shapes_only(other, model.config)
            state = built.state_dict()
            placed = places(built, get_model_conversion_mapping(built), names)
        # Whatever the reason is, a class that cannot be built loads no head.
        except Exception:
            continue
        found |= {
            name
            for name, place in placed.items()
            if place.pattern is None and place.target in state and tuple(state[place.target].shape) == index.tensors[name].shape
        }
    return found


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a causal mask, or the number that masks, as old classes stored them: never the bias of a projection."""
    leaf = name.rpartition(".")[2]
    if leaf in ("masked_bias", "mask_value"):
        return shape in ((), (1,))
    return leaf in ("bias", "causal_mask") and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _prefix(name: str) -> str:
    """``name`` up to its first number, or to its first dot if it has no number."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return parts[0]


def _family(prefix: str, loaded: Iterable[str]) -> str:
    """The first part of ``prefix`` if no loaded tensor begins with it, otherwise ``prefix``."""
    first = prefix.split(".")[0]
    return prefix if any(name.split(".")[0] == first for name in loaded) else first


def _twice(target: str, names: list[str]) -> Refusal:
    return Refusal(
        names[-1],
        f"the checkpoint holds {names[0]} and {names[-1]}, which are both {target}",
        "only one of them would be used; remove the other from the checkpoint",
    )


def _same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors hold the same values. Raises `ModelError` if a file cannot be read."""
    import torch

    from chanfmt.models.stored.tensors import read_tensor

    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        return torch.equal(read_tensor(one).double(), read_tensor(other).double())
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            for start in range(0, one.nbytes, _CHUNK):
                size = min(_CHUNK, one.nbytes - start)
                if first.read(size) != second.read(size):
                    return False
    except OSError as error:
        raise ModelError(f"cannot read {one.file}: {error.strerror}") from None
    return True


class _Described:
    """A stored tensor without its values. transformers indexes it with an ellipsis when it wants the values."""

    def __init__(self, entry: TensorEntry) -> None:
        self._shape = entry.shape

    def __getitem__(self, index: Any) -> Any:
        import torch

        return torch.empty(self._shape, device="meta")
