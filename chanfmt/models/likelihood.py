"""Negative log-likelihoods of classes or tokens under logits."""

from __future__ import annotations

import torch
from torch.nn import functional


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods of ``targets`` (...) under ``logits`` (..., class), in float32 at least."""
    return _nll(logits, targets, "sum")


def summed_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum that `nll` returns, with its terms added up in float64 and without a gradient."""
    # The sum is taken on the CPU, because not every accelerator has float64.
    return float(_nll(logits, targets, "none").cpu().double().sum())


def _nll(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    # A model on several devices may give its logits on another device than its tokens.
    return functional.cross_entropy(logits, targets.reshape(-1).to(logits.device), reduction=reduction)


def differentiated(loss: torch.Tensor) -> float:
    """Run the backward pass of ``loss``. Returns its value."""
    loss.backward()
    return float(loss.detach())
