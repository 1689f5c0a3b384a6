"""The paper's definitions, written down plainly: the oracle of the labels."""

from __future__ import annotations


def plain_top(values, count):
    """Largest first, lowest index first among equals."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def plain_connectivity(write, core, size):
    hidden, channels = len(write), len(write[0])
    mass = [sum(abs(float(write[h][s])) for s in core) for h in range(hidden)]
    support = plain_top(mass, min(size, hidden))
    conn = []
    for j in range(channels):
        whole = sum(abs(float(write[h][j])) for h in range(hidden))
        part = sum(abs(float(write[h][j])) for h in support)
        conn.append(part / whole if whole else 0.0)
    return support, conn


def plain_protection(redundancy, halo, alpha, gamma):
    factor = [1.0] * len(redundancy)
    ordered = sorted(halo, key=lambda j: (redundancy[j], j))
    for position, j in enumerate(ordered):
        if len(ordered) > 1:
            r = position / (len(ordered) - 1)
            factor[j] = alpha + (1 - alpha) * (1 - r**gamma)
    return factor
