"""Write calibration rows as some pruning scripts use them: one line of text per row, cut or padded with EOS to one length.

    python examples/padded_rows.py MODEL TEXT ROWS LENGTH OUT.npz

`atlas build --calib OUT.npz` measures the rows as they are, so that the effect of the padding can be measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from chanfmt.hub.locate import locate_model


def main() -> None:
    if len(sys.argv) != 6:
        raise SystemExit(f"usage: {sys.argv[0]} MODEL TEXT ROWS LENGTH OUT.npz")
    model, text, count, length, output = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    tokenizer = locate_model(model).tokenizer
    lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = np.full((count, length), tokenizer.eos_token_id, dtype=np.int64)
    real = 0
    for row, line in zip(rows, lines, strict=False):
        tokens = tokenizer(line)["input_ids"][:length]
        row[: len(tokens)] = tokens
        real += len(tokens)
    np.savez(output, input_ids=rows)
    print(f"{min(count, len(lines))} rows, {real:,} tokens of text and {rows.size - real:,} of padding")


if __name__ == "__main__":
    main()
