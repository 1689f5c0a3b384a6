"""The precision of matrix products in a refit: as fast as they can be without harm to the fit, or in full."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def descent_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products of a gradient descent over weights in float32, in a model of ``dtype``.

    A 16-bit ``dtype`` stays. On a CPU with instructions for products of bfloat16, which are two to four times as fast as those
    of float32, it is bfloat16. The same CPU always gives the same dtype.
    """
    return torch.bfloat16 if dtype == torch.float32 and device.type == "cpu" and _bfloat16_on_cpu() else dtype


def half_products(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """In the body, products are computed in ``dtype`` if it has 16 bits, also of weights in float32.

    Rounded weights are not kept from one product to the next, because a descent changes the weights in the body.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16), cache_enabled=False)


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
