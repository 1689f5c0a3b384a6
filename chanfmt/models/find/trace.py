"""Follow the channels of every linear map through one forward pass of a model.

Under a dispatch mode, each tensor that depends on the input carries a `Label`. The label says of which outputs of which
matrix products the tensor's elements are elementwise functions. Operations that only move elements are repeated on the
channel numbers; elementwise operations join labels; a product with a parameter starts a new label; every other operation
makes its result opaque. So the input of every matrix product is known exactly, whatever the modules of the model and their
names.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from chanfmt.models.ffn import Bias, Matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

aten = torch.ops.aten

_PRODUCTS = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
}
"""Matrix products: positions of the input, the weight, and the bias among their arguments."""
_MOVES = frozenset(
    {
        aten._unsafe_view,
        aten.clone,
        aten.index,
        aten.index_select,
        aten.gather,
        aten.constant_pad_nd,
        aten.repeat,
        aten.roll,
        aten.flip,
        aten.masked_select,
        aten.contiguous,
        aten.lift_fresh,
        aten.unfold,
        aten._reshape_alias,
        aten.reshape,
        aten.alias,
        aten.take_along_dim,
    }
)
"""Operations besides views that only move elements."""
_JOINS = frozenset({aten.cat, aten.stack})
_COPIES = frozenset({aten._to_copy, aten.to, aten.copy_, aten.lift_fresh_copy})
_NORMS = frozenset({aten.native_layer_norm, aten._fused_rms_norm, aten.rms_norm, aten.layer_norm})
_LINEAR = frozenset(
    {
        aten.add,
        aten.sub,
        aten.rsub,
        aten.neg,
        aten.mul,
        aten.div,
        aten.add_,
        aten.sub_,
        aten.mul_,
        aten.div_,
        aten.neg_,
        aten.zeros_like,
        aten.masked_fill,
        aten.masked_fill_,
        aten.addcmul,
    }
)
"""Elementwise operations that are linear in each input; a division is linear in its first input."""
_LIMITS = frozenset({aten.clamp, aten.clamp_, aten.clamp_max, aten.clamp_max_, aten.minimum, aten.maximum})
_POWERS = frozenset({aten.pow, aten.square, aten.abs})
"""Operations that a norm applies to the values that it measures."""
_TIMES = frozenset({aten.mul, aten.mul_, aten.div, aten.div_, aten.addcmul})
_OPAQUE_VIEWS = frozenset({aten.as_strided, aten.view_as_complex, aten.view_as_real})
_CHANNEL_BITS = 32
_MAX_PARTS = 8


@dataclass
class Call:
    """One matrix product with a parameter.

    Attributes:
        number: Position among the products of the pass.
        matrix: The matrix.
        label: What the input of the product depends on.
        rows: Rows of the input.
        bias: The bias added to the output, if any.
        bent: Whether the output goes through a nonlinear function before it is added to a residual stream.
    """

    number: int
    matrix: Matrix
    label: Label
    rows: int
    bias: Bias | None = None
    bent: bool = False


@dataclass(frozen=True)
class Part:
    """One function of the outputs of products.

    Attributes:
        calls: Numbers of the products, and perhaps of further ones.
        codes: The product and the channel that each element of the tensor is a function of, int64.
        curved: 0 for a linear function, 1 for a linear function with limits, 2 for any other.
    """

    calls: frozenset[int]
    codes: torch.Tensor
    curved: int = 0


@dataclass(frozen=True)
class Label:
    """What the elements of a tensor depend on.

    Attributes:
        parts: Outputs of products of which each element is a function, elementwise.
        opaque: Whether the elements depend on something else too that differs from channel to channel.
        mixed: Whether they depend on a number per token that was computed from the channels of the parts: a norm, a threshold.
        joined: Whether two parts were multiplied.
        calls: Products on whose outputs the elements depend in a way that is not followed.
    """

    parts: tuple[Part, ...] = ()
    opaque: bool = False
    mixed: bool = False
    joined: bool = False
    calls: frozenset[int] = field(default_factory=frozenset)

    @property
    def everything(self) -> frozenset[int]:
        """Products on whose outputs the elements depend, in whatever way."""
        return self.calls.union(*(part.calls for part in self.parts))

    @property
    def curved(self) -> bool:
        """Whether the elements are a nonlinear function of the parts."""
        return self.joined or any(part.curved for part in self.parts)


def decode(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The products and the channels that ``codes`` of a `Part` name."""
    return codes >> _CHANNEL_BITS, codes & ((1 << _CHANNEL_BITS) - 1)


class Tracer(TorchDispatchMode):
    """Records the `Call`s of the forward passes that run inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._labels: dict[int, Label] = {}
        self._held: list[torch.Tensor] = []
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._written: dict[int, Label] = {}
        """Labels of memory that was changed in place, for other tensors that share the memory."""
        self._parameters: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._meet(model.named_parameters())

    def _meet(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, parameter in parameters:
            # Parameters are known by their memory, which those on the meta device do not have.
            if not parameter.is_meta:
                self._parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter.detach()))

    @contextlib.contextmanager
    def visiting(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Know ``parameters`` of the model, by name, in the body only: later parameters may come to lie in the same memory."""
        before = {pointer: list(known) for pointer, known in self._parameters.items()}
        self._meet(parameters)
        try:
            yield
        finally:
            self._parameters = before

    def begin(self, tensor: torch.Tensor) -> None:
        """Mark an input of the model."""
        self._set(tensor, Label(opaque=True))

    def mark(self) -> int:
        """The current position, which `rewind` can go back to."""
        return len(self._held)

    def rewind(self, mark: int, keep: torch.Tensor) -> None:
        """Forget the tensors since ``mark``, except ``keep``, and the labels of the calls so far, to bound the memory."""
        label = self._label(keep)
        for call in self.calls:
            call.label = Label()
        for tensor in self._held[mark:]:
            storage = tensor.untyped_storage().data_ptr()
            self._labels.pop(id(tensor), None)
            self._written.pop(storage, None)
            self._by_storage.pop(storage, None)
        del self._held[mark:]
        if label is not None:
            self._set(keep, label)

    def end(self) -> None:
        """Forget the tensors of the pass."""
        self._labels.clear()
        self._held.clear()
        self._by_storage.clear()
        self._written.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, torch.Tensor)]
        if func in _PRODUCTS and isinstance(result, torch.Tensor) and self._product(func, args, result):
            return result
        labels = [label for tensor in tensors if (label := self._label(tensor)) is not None]
        outputs = [item for item in tree_flatten(result)[0] if isinstance(item, torch.Tensor)]
        if not labels:
            for output in outputs:
                self._forget(output)
            return result
        self._carry(func, args, kwargs, tensors, outputs)
        return result

    def _carry(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        packet = func.overloadpacket
        written = outputs[0] if outputs and any(output is tensor for output in outputs for tensor in tensors) else None
        labels: list[Label | None]
        if packet in _COPIES:
            source = tensors[-1] if packet is aten.copy_ else tensors[0]
            label = self._label(source)
            same = source.shape == outputs[0].shape
            labels = [label if same or label is None else _opaque([label])]
        elif packet in _JOINS:
            labels = [self._joined(func, args, kwargs)]
        elif (func.is_view and packet not in _OPAQUE_VIEWS) or packet in _MOVES:
            labels = list(self._moved(func, args, kwargs, tensors, len(outputs)))
        elif packet is aten.glu:
            labels = [self._halves(args)]
        elif packet in _NORMS:
            labels = [self._normed(tensors[0]), *(self._opaque_of(tensors) for _ in outputs[1:])]
        elif torch.Tag.pointwise in func.tags or packet in _LINEAR:
            labels = [self._elementwise(packet, args, tensors, output) for output in outputs]
        else:
            labels = [self._opaque_of(tensors) for _ in outputs]
        if written is not None:
            self._spoil(written, self._opaque_of(tensors))
        for output, label in zip(outputs, labels, strict=True):
            if label is None:
                self._forget(output)
            else:
                self._set(output, label)

    def _product(self, func: Any, args: Any, result: torch.Tensor) -> bool:
        """Record a product with a parameter. Returns False if the weight is not a parameter, or the input carries no label."""
        source, weight, bias = _PRODUCTS[func]
        matrix, label = self._matrix(args[weight]), self._label(args[source])
        if matrix is None or label is None:
            return False
        number = len(self.calls)
        call = Call(number, matrix, label, args[source].shape[:-1].numel())
        if bias is not None:
            call.bias = self._vector(args[bias])
        self.calls.append(call)
        codes = torch.arange(result.shape[-1], device=result.device) + (number << _CHANNEL_BITS)
        self._set(result, Label((Part(frozenset((number,)), codes.expand(result.shape)),)))
        return True

    def _matrix(self, weight: torch.Tensor) -> Matrix | None:
        found = self._parameter(weight)
        if found is None or weight.ndim < 2:
            return None
        name, parameter = found
        offset = weight.storage_offset() - parameter.storage_offset()
        inputs, outputs = weight.shape[-2:]
        if parameter.ndim == 3:
            plain, step = parameter.stride()[-2:], parameter.stride(0)
            batched = weight.ndim == 3 and weight.stride(0) == step and weight.shape[0] == parameter.shape[0]
            index, row = (None, 0) if batched else (offset // step, 0)
        elif parameter.ndim == 2:
            plain, batched, index = parameter.stride(), False, None
            row = offset // parameter.stride(0)
        else:
            return None
        return Matrix(name, index, row, weight.stride()[-2:] == plain, inputs, outputs, batched)

    def _vector(self, bias: torch.Tensor) -> Bias | None:
        found = self._parameter(bias)
        if found is None:
            return None
        name, parameter = found
        if parameter.ndim == 2 and bias.shape[-1] == parameter.shape[-1]:
            return Bias(name, (bias.storage_offset() - parameter.storage_offset()) // parameter.stride(0))
        return Bias(name, None) if parameter.ndim == 1 else None

    def _parameter(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        for name, parameter in self._parameters.get(tensor.untyped_storage().data_ptr(), ()):
            first = parameter.storage_offset()
            if first <= tensor.storage_offset() < first + max(1, parameter.numel()):
                return name, parameter
        return None

    def _moved(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], outputs: int) -> Iterator[Label | None]:
        label = self._label(tensors[0])
        if label is None or any((other := self._label(tensor)) is not None and not other.opaque for tensor in tensors[1:]):
            yield from [self._opaque_of(tensors)] * outputs
            return
        moved = [self._repeated(func, args, kwargs, tensors[0], part.codes) for part in label.parts]
        for index in range(outputs):
            parts = tuple(replace(part, codes=codes[index]) for part, codes in zip(label.parts, moved, strict=True))
            yield replace(label, parts=parts)

    def _repeated(self, func: Any, args: Any, kwargs: Any, source: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
        def other(tensor: torch.Tensor) -> torch.Tensor:
            return codes if tensor is source else tensor

        with _paused():
            if func.is_view and not codes.is_contiguous():
                # A view that the strides of the data allow may not be possible for the expanded codes.
                codes = codes.contiguous()
            result = func(*tree_map_only(torch.Tensor, other, args), **tree_map_only(torch.Tensor, other, kwargs))
        return [item for item in tree_flatten(result)[0] if isinstance(item, torch.Tensor)]

    def _joined(self, func: Any, args: Any, kwargs: Any) -> Label:
        labels = [self._label(tensor) for tensor in args[0]]
        known = [label for label in labels if label is not None]
        if len(known) < len(labels) or any(label.opaque or len(label.parts) != len(known[0].parts) for label in known):
            return _opaque(known)
        parts = []
        for members in zip(*(label.parts for label in known), strict=True):
            with _paused():
                codes = func([member.codes for member in members], *args[1:], **kwargs)
            parts.append(
                Part(frozenset().union(*(member.calls for member in members)), codes, max(member.curved for member in members))
            )
        return Label(tuple(parts), False, any(label.mixed for label in known), any(label.joined for label in known))

    def _halves(self, args: Any) -> Label | None:
        label = self._label(args[0])
        if label is None or label.opaque:
            return label
        axis = args[1] if len(args) > 1 else -1
        parts = []
        for part in label.parts:
            with _paused():
                plain, gate = part.codes.chunk(2, axis)
            parts += [replace(part, codes=plain), replace(part, codes=gate, curved=2)]
        return replace(label, parts=tuple(parts), joined=True)

    def _normed(self, tensor: torch.Tensor) -> Label | None:
        label = self._label(tensor)
        return None if label is None else replace(label, mixed=True)

    def _elementwise(self, packet: Any, args: Any, tensors: list[torch.Tensor], output: torch.Tensor) -> Label:
        parts: list[Part] = []
        calls: set[int] = set()
        opaque = mixed = joined = False
        factors = 0
        for position, tensor in enumerate(tensors):
            label = self._label(tensor)
            if label is None:
                continue
            wide = tensor.ndim > 0 and (tensor.shape[-1] == output.shape[-1] or output.ndim == 0)
            mixed |= label.mixed
            joined |= label.joined
            if label.opaque or not wide:
                opaque |= wide and label.opaque and tensor.shape[-1] != 1
                calls |= label.everything
                continue
            factors += 1
            linear = packet in _LINEAR and not (packet in (aten.div, aten.div_) and position > 0)
            curved = 0 if linear else 1 if packet in _LIMITS else 2
            for part in label.parts:
                if curved == 2 and not part.curved and packet not in _POWERS:
                    for number in part.calls:
                        self.calls[number].bent = True
                with _paused():
                    codes = part.codes.expand(output.shape)
                parts.append(Part(part.calls, codes, max(part.curved, curved)))
        mixed |= any(calls & part.calls for part in parts)
        if packet in (aten.add, aten.add_) and len(tensors) == 2:
            self._note_bias(tensors, parts)
        parts = _unique(parts)
        if opaque or not parts or len(parts) > _MAX_PARTS:
            return Label(opaque=True, calls=frozenset(calls.union(*(part.calls for part in parts))))
        return Label(tuple(parts), False, mixed, joined or (factors > 1 and packet in _TIMES), frozenset(calls))

    def _note_bias(self, tensors: Sequence[torch.Tensor], parts: Iterable[Part]) -> None:
        for part in parts:
            for number in part.calls if not part.curved else ():
                call = self.calls[number]
                for tensor in tensors:
                    if (
                        call.bias is None
                        and self._label(tensor) is None
                        and tensor.ndim
                        and tensor.shape[-1] == call.matrix.outputs
                    ):
                        call.bias = self._vector(tensor)

    def _opaque_of(self, tensors: list[torch.Tensor]) -> Label | None:
        labels = [label for tensor in tensors if (label := self._label(tensor)) is not None]
        return _opaque(labels) if labels else None

    def _label(self, tensor: torch.Tensor) -> Label | None:
        return self._labels.get(id(tensor)) or self._written.get(tensor.untyped_storage().data_ptr())

    def _set(self, tensor: torch.Tensor, label: Label) -> None:
        if id(tensor) not in self._labels:
            # The tensor is held, so that no other tensor of the pass gets its id.
            self._held.append(tensor)
            self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._labels[id(tensor)] = label

    def _forget(self, tensor: torch.Tensor) -> None:
        self._labels.pop(id(tensor), None)

    def _spoil(self, written: torch.Tensor, label: Label | None) -> None:
        """Take note that ``written`` was changed in place: other tensors that share its memory are no longer followed."""
        if label is None:
            return
        storage = written.untyped_storage().data_ptr()
        self._written[storage] = label
        for tensor in self._by_storage.get(storage, ()):
            if tensor is not written:
                self._labels[id(tensor)] = _opaque([label, self._labels.get(id(tensor), label)])


def _opaque(labels: Iterable[Label]) -> Label:
    return Label(opaque=True, calls=frozenset().union(*(label.everything for label in labels)))


def _unique(parts: list[Part]) -> list[Part]:
    """``parts``, but parts with the same codes joined to one."""
    found: list[Part] = []
    for part in parts:
        for index, other in enumerate(found):
            if other.calls == part.calls and (other.codes is part.codes or torch.equal(other.codes, part.codes)):
                found[index] = replace(other, curved=max(other.curved, part.curved))
                break
        else:
            found.append(part)
    return found


@contextlib.contextmanager
def _paused() -> Iterator[None]:
    """Switch the dispatch mode off in the body: arithmetic on channel numbers does not belong to the model."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def trace(model: nn.Module, inputs: Iterable[torch.Tensor], forward: Callable[[], object]) -> list[Call]:
    """Trace ``forward()``, which runs ``model`` on ``inputs``. Returns its matrix products in the order in which they ran."""
    tracer = Tracer(model)
    with torch.no_grad(), tracer:
        for tensor in inputs:
            tracer.begin(tensor)
        forward()
    tracer.end()
    return tracer.calls
