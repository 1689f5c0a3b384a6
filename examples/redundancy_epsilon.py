"""Redundancy of channels to supernodes, with an exact correlation and with 1e-8 added in the denominator.

    python examples/redundancy_epsilon.py MODEL TEXT [LAYER ...]

The script does not use chanfmt to measure, so it is an independent check of chanfmt too. Each estimate stands next to its
null: the correlation of the same channels with the supernodes one sequence earlier.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from chanfmt.hub.locate import locate_model

SEQUENCES, LENGTH, NEAREST, RHO = 16, 512, 5, 0.01


def products(model: Any, tokens: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
    """q = u dL/du of the channels of each layer over all tokens, float64 (token, channel). L is the mean loss of a sequence."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach()
        inputs[0].register_hook(lambda gradient: found[layer].append((values * gradient).double().flatten(0, 1)))

    handles = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda module, inputs, layer=layer: keep(layer, inputs))
        for layer in layers
    ]
    for row in tokens:
        # The graph begins after the embedding table, because nothing needs the gradient of the table.
        start = model.get_input_embeddings()(row[None]).detach().requires_grad_(True)
        logits = model(inputs_embeds=start).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), row[1:]).backward()
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def redundancy(q: torch.Tensor, core: torch.Tensor, others: torch.Tensor, epsilon: float, shift: int) -> float:
    """Median over ``others`` of the mean of the largest -1/2 log(1 - max(r, 0)^2) to ``core``."""
    centred = q - q.mean(dim=0)
    a, b = centred[:, others], torch.roll(centred[:, core], shift, dims=0)
    covariance = a.T @ b / len(q)
    variances = a.square().mean(dim=0)[:, None] * b.square().mean(dim=0)[None]
    correlation = (covariance / torch.sqrt(variances + epsilon)).clamp(0, 1 - 1e-15)
    found = -0.5 * torch.log1p(-correlation.square())
    return float(found.topk(min(NEAREST, len(core)), dim=1).values.mean(dim=1).median())


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(f"usage: {sys.argv[0]} MODEL TEXT [LAYER ...]")
    source = locate_model(sys.argv[1])
    logging.disable_progress_bar()
    text = Path(sys.argv[2]).read_text(encoding="utf-8")
    tokens = torch.tensor(source.tokenizer(text)["input_ids"][: SEQUENCES * LENGTH]).reshape(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = [int(name) for name in sys.argv[3:]] or [0, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1]
    print(f"{len(tokens)} x {LENGTH} tokens")
    print("| layer | median variance of q | exact | its null | with 1e-8 | its null |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layer, q in products(model, tokens, layers).items():
        order = q.square().mean(dim=0).argsort(descending=True)
        size = max(1, int(RHO * q.shape[1]))
        core, others = order[:size], order[size:]
        cells = [redundancy(q, core, others, epsilon, shift) for epsilon in (0.0, 1e-8) for shift in (0, LENGTH)]
        numbers = [f"{cell:.1e}" for cell in (float(q.var(dim=0).median()), *cells)]
        print(f"| {layer} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
