"""Curves in braille and histograms in eighths of a cell, as lines of text. Pure numpy."""

from __future__ import annotations

import numpy as np

BLOCKS = np.array(list(" ▁▂▃▄▅▆▇█"))
# Bits of U+2800 by dot row (top to bottom) and dot column.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def braille(dots: int) -> str:
    """The braille character with ``dots``, bits as in U+2800 to U+28FF; a space for no dots, because every font has a space."""
    return chr(0x2800 + dots) if dots else " "


def braille_curve(samples: np.ndarray, height: int) -> list[str]:
    """A line through ``samples``, float (2 * width,) in [0, 1] or NaN, as ``height`` lines of ``width`` cells."""
    rows = 4 * height
    known = np.isfinite(samples)
    if not known.all():
        # The line must not jump at an unknown sample. So the sample repeats the last known one, or else the first known one.
        last = np.maximum.accumulate(np.where(known, np.arange(len(samples)), -1))
        samples = np.where(last >= 0, samples[last], samples[np.argmax(known)]) if known.any() else np.zeros(len(samples))
    places = np.clip(np.round((1.0 - samples) * (rows - 1)), 0, rows - 1).astype(np.int64)
    before = np.concatenate((places[:1], places[:-1]))
    # A step is drawn in its right column, beginning next to the previous dot.
    low = np.where(before < places, np.minimum(before + 1, places), places)
    high = np.where(before > places, np.maximum(before - 1, places), places)
    grid = np.arange(rows)[:, None]
    lit = (grid >= low) & (grid <= high) & known
    cells = lit.reshape(height, 4, -1, 2) * _DOTS[None, :, None, :]
    return ["".join(map(braille, line)) for line in cells.sum(axis=(1, 3)).tolist()]


def braille_scatter(x: np.ndarray, y: np.ndarray, labels: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Points as braille dots.

    Args:
        x, y: Positions in [0, 1], float (points,) each.
        labels: Label of every point, (points,).

    Returns:
        Bits as in U+2800 to U+28FF, int64 (height, width), and the highest label in every cell, int64 (height, width).
    """
    columns = np.minimum((x * 2 * width).astype(np.int64), 2 * width - 1)
    rows = np.minimum(((1.0 - y) * 4 * height).astype(np.int64), 4 * height - 1)
    dots, top = np.zeros((height, width), dtype=np.int64), np.zeros((height, width), dtype=np.int64)
    cells = (rows // 4, columns // 2)
    np.bitwise_or.at(dots, cells, _DOTS[rows % 4, columns % 2])
    np.maximum.at(top, cells, labels)
    return dots, top


def histogram(counts: np.ndarray, height: int) -> list[str]:
    """Bars for ``counts``, int (width,), as ``height`` lines of ``width`` cells. Heights are square roots; the tallest bar is full."""
    top = counts.max(initial=0)
    if top <= 0:
        return [" " * len(counts)] * height
    eighths = np.ceil(np.sqrt(counts / top) * 8 * height).astype(np.int64)
    levels = np.clip(eighths - 8 * np.arange(height - 1, -1, -1)[:, None], 0, 8)
    return ["".join(line) for line in BLOCKS[levels]]


def log_counts(values: np.ndarray, bins: int) -> tuple[np.ndarray, float, float]:
    """Histogram of log10 of the positive ``values``: counts, int64 (bins,), and the ends of the range (0, 0 if no value is positive)."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return np.zeros(bins, dtype=np.int64), 0.0, 0.0
    logs = np.log10(positive.astype(np.float64))
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    return np.histogram(logs, bins, (low, high))[0], low, high


def axis_labels(ticks: list[tuple[float, str]], width: int) -> str:
    """Texts centred at positions in [0, 1] of a line of ``width`` cells. A text that would touch the previous text is left out."""
    line = [" "] * width
    free = 0
    for position, text in ticks:
        start = min(max(0, round(position * (width - 1) - len(text) / 2)), max(0, width - len(text)))
        if start < free or len(text) > width:
            continue
        line[start : start + len(text)] = text
        free = start + len(text) + 1
    return "".join(line)


def rank_ticks(channels: int, *, log: bool) -> list[tuple[float, str]]:
    """Labels of a rank axis whose scale is that of `chanfmt.analysis.strip.bin_edges`: first rank, last rank, and round ranks between."""
    if not log:
        return [(0.0, "1"), (0.5, str(channels // 2)), (1.0, str(channels))]
    scale = np.log(channels + 1.0)
    inner = [(float(np.log(10.0**power) / scale), _short(10**power)) for power in range(1, len(str(channels)))]
    return [(0.0, "1"), *(tick for tick in inner if tick[0] < 0.88), (1.0, str(channels))]


def decade_ticks(low: float, high: float, width: int) -> list[tuple[float, str]]:
    """As many labels as fit, at evenly spaced whole decades between the log10 values ``low`` and ``high``."""
    step = max(1, int(np.ceil((high - low) * 7 / width)))
    decades = range(int(np.ceil(low / step)) * step, int(np.floor(high)) + 1, step)
    return [((decade - low) / (high - low), f"1e{decade}") for decade in decades]


def _short(value: int) -> str:
    return f"{value // 1000}k" if value >= 1000 else str(value)
