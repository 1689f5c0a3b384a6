"""The precision of matrix products in a refit: as fast as they can be without harm to the fit, or in full."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

_TOLERANCE = 1e-5


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices use the fastest kernels in the body.

    On a GPU they may round inputs to TF32. On a CPU the kernels of oneDNN are used where they keep the precision of float32,
    because they are up to twice as fast as the others.
    """
    setting = "highest"
    if device.type == "cuda":
        setting = "high"
    elif device.type == "cpu" and _exact_on_cpu():
        setting = "medium"
    with _products(setting):
        yield


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Let products of float32 matrices be computed in float32 in the body."""
    with _products("highest"):
        yield


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices keep the precision of float32 in the body, with the fastest kernels that do."""
    with _products("medium" if device.type == "cpu" and _exact_on_cpu() else "highest"):
        yield


def descent_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the products of a gradient descent over weights in float32.

    It is bfloat16 where the hardware has such products, which are two to four times as fast as those of float32: on GPUs, and on
    CPUs with AVX512_BF16 or AMX. The same device always gives the same dtype.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _bfloat16_on_cpu()
    return torch.bfloat16 if fast else torch.float32


def half_products(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """In the body, products are computed in ``dtype`` if it has 16 bits, also of weights in float32.

    Rounded weights are not kept from one product to the next, because a descent changes the weights in the body.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16), cache_enabled=False)


@contextlib.contextmanager
def in_float32(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``model`` compute in float32 in the body, whatever its weights are in. They keep their values.

    Args:
        blocks: Modules whose weights are in float32 only while they run, to save memory.
    """
    inside = {id(tensor) for block in blocks for tensor in _floats(block)}
    rest = [tensor for tensor in _floats(model) if id(tensor) not in inside]
    narrow: dict[int, torch.dtype] = {}

    def widen(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            narrow[id(tensor)] = tensor.dtype
            tensor.data = tensor.data.float()

    def restore(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.to(narrow[id(tensor)])

    handles = [block.register_forward_pre_hook(lambda block, args: widen(_floats(block))) for block in blocks]
    handles += [block.register_forward_hook(lambda block, args, output: restore(_floats(block))) for block in blocks]
    widen(rest)
    try:
        yield
    finally:
        restore(rest)
        for handle in handles:
            handle.remove()


def _floats(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of floating dtype, each once."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    return [tensor for tensor in tensors.values() if tensor.is_floating_point()]


@contextlib.contextmanager
def _products(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _bfloat16_on_cpu() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and torch can say so and uses them."""
    if not hasattr(torch.cpu, "get_capabilities") or not torch.backends.mkldnn.is_available():
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@functools.cache
def _exact_on_cpu() -> bool:
    """Whether this CPU computes products of float32 matrices in float32 even if less is asked for."""
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=random) for _ in range(2))
    with _products("medium"):
        found = left @ right
    exact = left.double() @ right.double()
    return float((found.double() - exact).abs().max()) <= _TOLERANCE * float(exact.abs().max())
