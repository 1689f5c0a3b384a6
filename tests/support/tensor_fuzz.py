"""Random mistakes in the tensor files of a checkpoint. Each must be refused by name, or change no bit of the atlas.

    python -m tests.support.tensor_fuzz [COUNT] [SEED]

drops, renames, duplicates or adds one tensor of a tiny checkpoint, or changes its dtype or shape, COUNT times. Each mutant
is loaded in memory and streamed. If it is not refused, its atlases are built both ways and compared with those of the clean
checkpoint. Prints how many mutants of each kind were refused and how many are proven equal, and every failure.

All weights are multiples of 1/256 below 1, which float64, float32, bfloat16 and float16 hold exactly. So another floating dtype
keeps the values, and the atlas must stay the same.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import chanfmt
from chanfmt.base.errors import ModelError
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.streamed import open_streamed
from tests.support.tiny import save_tiny

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "qwen3_moe": {
        "hidden_size": 32,
        "intermediate_size": 44,
        "moe_intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
}
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_TEXT = "The quick brown fox jumps over the lazy dog, again and again; then it rests. " * 20

Tensors = dict[str, torch.Tensor]


def clean(case: str, directory: Path) -> Path:
    """A checkpoint of ``case`` in ``directory`` whose weights are multiples of 1/256."""
    save_tiny(directory, case.removesuffix("-tied"), **CASES[case])
    values = load_file(directory / "model.safetensors")
    rounded = {name: (tensor * 256).round().clamp(-255, 255) / 256 for name, tensor in values.items()}
    save_file(rounded, directory / "model.safetensors", {"format": "pt"})
    return directory


def drop(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    name = chance.choice(sorted(tensors))
    del tensors[name]
    return (name,)


def rename(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    old = chance.choice(sorted(tensors))
    new = _other_name(old, tensors, chance)
    tensors[new] = tensors.pop(old)
    return (old, new)


def duplicate(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    old = chance.choice(sorted(tensors))
    new = "lm_head.weight"
    if new in tensors or chance.random() < 0.5:
        new = _other_name(old, tensors, chance)
    tensors[new] = tensors[old].clone()
    if chance.random() < 0.5:
        tensors[new] = tensors[new].flip(0)
    return (old, new)


def add(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    name = chance.choice(sorted(tensors))
    stem = name.rpartition(".")[0]
    length = tensors[name].shape[0]
    new, value = chance.choice(
        [
            (f"{stem}.bias", torch.randn(length)),
            (f"{stem}.weight_scale", torch.tensor(0.5)),
            (f"{stem}.scales", torch.ones(length)),
            (f"{stem}.lora_A.weight", torch.randn(4, length)),
            (f"{stem}.extra.weight", torch.randn(4, length)),
            (f"mtp.layers.0.{stem}.weight", torch.randn(4, length)),
            ("score.weight", torch.randn(2, tensors[name].shape[-1])),
            ("vision_tower.proj.weight", torch.randn(4, 4)),
            (f"model.layers.7.{stem}.weight", torch.randn(4, 4)),
            (f"{stem}.rotary_emb.inv_freq", torch.randn(4)),
        ]
    )
    while new in tensors:
        new += "_"
    tensors[new] = value
    return (new,)


def change_dtype(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name].to(chance.choice([dtype for dtype in _DTYPES if dtype != tensors[name].dtype]))
    return (name,)


def change_shape(tensors: Tensors, chance: random.Random) -> tuple[str, ...]:
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    changed = [
        tensor[None],
        tensor.flatten() if tensor.ndim > 1 else tensor[:, None],
        torch.cat([tensor, tensor[:1]]),
        tensor[:-1],
        tensor.repeat(2, *[1] * (tensor.ndim - 1)),
        tensor[..., :-1],
        tensor[:0],
    ]
    if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1]:
        changed += [tensor.T, tensor.reshape(tensor.T.shape)]
    tensors[name] = chance.choice(changed).contiguous().clone()
    return (name,)


MISTAKES = (drop, rename, duplicate, add, change_dtype, change_shape)


def _other_name(name: str, tensors: Tensors, chance: random.Random) -> str:
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    choices = [f"{name}_2", f"model.{name}", f"transformer.{name}", f"mtp.{name}", name.replace("weight", "bias"), "x"]
    if len(parts) > 2:
        choices += [".".join(parts[1:]), ".".join([*parts[:-2], parts[-1]])]
    if numbers:
        at = chance.choice(numbers)
        choices += [".".join([*parts[:at], str(chance.randrange(12)), *parts[at + 1 :]]) for _ in range(3)]
    return chance.choice([choice for choice in choices if choice not in tensors])


class Fuzz:
    """Mutants of all `CASES`, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text = directory / "text.txt"
        self.text.write_text(_TEXT)
        self.clean = {case: clean(case, directory / case) for case in CASES}
        self.tensors = {case: load_file(path / "model.safetensors") for case, path in self.clean.items()}
        self.expected = {
            (case, stream): self.arrays(path, stream) for case, path in self.clean.items() for stream in (False, True)
        }

    def arrays(self, model: Path, stream: bool) -> dict[str, bytes]:
        """Every measured array of the atlas of ``model``, as bytes."""
        output = self.directory / "fuzz.h5"
        with chanfmt.build(
            model, output, self.text, sequences=2, seq_len=16, batch_size=2, stream=stream, support_size=8, overwrite=True
        ) as atlas:
            stacks = atlas.content().stacks
            return {
                f"{number}/{name}": values.tobytes()
                for number, stack in enumerate(stacks)
                for name, values in stack.variables.items()
            }

    def attempt(self, number: int, seed: int) -> tuple[str, str]:
        """Try one mutant. Returns its kind and outcome, and what is wrong, which is empty for a good outcome."""
        chance = random.Random(f"{seed}/{number}")
        case = sorted(CASES)[number % len(CASES)]
        mistake = MISTAKES[number // len(CASES) % len(MISTAKES)]
        tensors = {name: tensor.clone() for name, tensor in self.tensors[case].items()}
        names = mistake(tensors, chance)
        mutant = self.directory / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(self.clean[case], mutant)
        save_file(tensors, mutant / "model.safetensors", {"format": "pt"})
        what = f"{mistake.__name__} {names} in {case}"
        said = [self._refusal(mutant, stream) for stream in (False, True)]
        if said[0] != said[1]:
            return f"{mistake.__name__}: FAILED", f"{what}: in memory {said[0]!r}, streamed {said[1]!r}"
        if said[0]:
            if any(name in said[0] for name in names):
                return f"{mistake.__name__}: refused by name", ""
            return f"{mistake.__name__}: FAILED", f"{what}: refused without the name: {said[0]}"
        for stream in (False, True):
            if self.arrays(mutant, stream) != self.expected[case, stream]:
                return (
                    f"{mistake.__name__}: FAILED",
                    f"{what}: accepted with another atlas, {'streamed' if stream else 'in memory'}",
                )
        return f"{mistake.__name__}: proven equal", ""

    @staticmethod
    def _refusal(model: Path, stream: bool) -> str:
        """What is said when ``model`` is opened; empty if it is not refused."""
        try:
            source = ModelSource(model)
            open_streamed(source, device="cpu") if stream else load_model(source, device="cpu")
        except ModelError as error:
            return str(error)
        return ""


def tally(count: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Try ``count`` mutants. Returns outcomes by kind, and the failures."""
    outcomes: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as directory:
        fuzz = Fuzz(Path(directory))
        for number in range(first, first + count):
            outcome, failure = fuzz.attempt(number, seed)
            outcomes[outcome] += 1
            if failure:
                failures.append(f"mutant {number} of seed {seed}: {failure}")
    return outcomes, failures


def main() -> int:
    """Entry point. Returns the exit code."""
    count, seed = (int(text) for text in [*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]])
    outcomes, failures = tally(count, seed)
    print(json.dumps(dict(sorted(outcomes.items())), indent=2))
    for failure in failures[:40]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
