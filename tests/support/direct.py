"""Sums and metrics by plain autograd: the oracle of the measuring pass."""

from __future__ import annotations

import numpy as np
import torch


def direct(model, ffns, ids):
    """u and s of every FFN, each (sequence, token, channel), by the model's own forward and full logits."""
    captured = {}

    def keep(name):
        def hook(module, args):
            u = args[0]
            if not u.requires_grad:
                u = u.detach().requires_grad_(True)
            u.retain_grad()
            captured[name] = u
            return (u,)

        return hook

    handles = [model.get_submodule(ffn.write.removesuffix(".weight")).register_forward_pre_hook(keep(ffn.write)) for ffn in ffns]
    us, ss = {ffn.write: [] for ffn in ffns}, {ffn.write: [] for ffn in ffns}
    for row in ids:
        logits = model(row[None], use_cache=False).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
        loss.backward()
        for ffn in ffns:
            u = captured[ffn.write]
            us[ffn.write].append(u.detach().double().reshape(len(row), -1).numpy())
            ss[ffn.write].append(u.grad.double().reshape(len(row), -1).numpy())
    for handle in handles:
        handle.remove()
    return {name: np.stack(value) for name, value in us.items()}, {name: np.stack(value) for name, value in ss.items()}


def members(measurement):
    """Statistics of every FFN, as the list of its experts' or a list of one."""
    return [statistics.members for statistics in measurement.statistics]


def direct_sums(u, s):
    q = u * s
    axes = (0, 1)
    return {
        "sum_u": u.sum(axes),
        "sum_u2": (u**2).sum(axes),
        "sum_s2": (s**2).sum(axes),
        "sum_q": q.sum(axes),
        "sum_abs_q": np.abs(q).sum(axes),
        "sum_q2": (q**2).sum(axes),
    }


def assert_metrics_close(found, expected, tolerance):
    """Relative to each value, or to a millionth of the layer's largest value if that is more."""
    scale = np.maximum(np.abs(expected), 1e-6 * np.abs(expected).max())
    np.testing.assert_array_less(np.abs(found - expected) / scale, tolerance)
