"""`atlas build --stream` for a model several times larger than the memory limit. Prints memory peaks next to the bound.

    python bench/stream.py [--blocks 25] [--limit-mib 1000] [--spool-limit GIB] [--directory DIR]

The script writes a random Llama checkpoint shard by shard (float32, 268 MB per block). Then it builds an atlas in a process
with limited private memory (RLIMIT_DATA: heap and anonymous mappings). The same build in memory, under the same limit, must
fail. The "bound" is what the design allows in addition to the bare interpreter with its libraries: one block, the resident
parts (embeddings and head), and the inputs kept in memory. A measured peak also includes the workspace of a batch, the sums
of one block, and weights during a cast.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN, WIDTH, HEADS, VOCAB = 2048, 8192, 16, 1024
SEQUENCES, SEQ_LEN, BATCH = 8, 64, 4
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=25)
    parser.add_argument("--limit-mib", type=int, default=1000)
    parser.add_argument("--spool-limit", type=float, default=0.03125)
    parser.add_argument("--directory", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        model = Path(directory) / "model"
        size = write_model(model, arguments.blocks)
        text = Path(directory) / "text.txt"
        text.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
        block = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH)
        resident = 4 * 2 * VOCAB * HIDDEN
        inputs = 4 * (arguments.blocks + 1) * SEQUENCES * SEQ_LEN * HIDDEN
        kept = min(inputs, arguments.spool_limit * 2**30)
        limit = arguments.limit_mib * MIB
        bare = run(["-c", "import chanfmt.building.build, transformers.models.llama.modeling_llama"], None)
        build = [
            "-m",
            "chanfmt",
            "build",
            str(model),
            "-o",
            str(Path(directory) / "out.h5"),
            "--calib",
            str(text),
            "--sequences",
            str(SEQUENCES),
            "--seq-len",
            str(SEQ_LEN),
            "--batch-size",
            str(BATCH),
            "--quiet",
            "--overwrite",
        ]
        print(
            f"model {size / MIB:.0f} MiB, {arguments.blocks} blocks of {block / MIB:.0f} MiB; limit {limit / MIB:.0f} MiB: "
            f"{size / limit:.1f} times the limit"
        )
        print(f"bare process: {bare}")
        print(
            f"bound: {bare.rss / MIB:.0f} bare + {block / MIB:.0f} block + {resident / MIB:.0f} resident "
            f"+ {kept / MIB:.0f} of {inputs / MIB:.0f} inputs = {(bare.rss + block + resident + kept) / MIB:.0f} MiB"
        )
        print(f"streamed: {run([*build, '--stream', '--spool-limit', str(arguments.spool_limit)], limit)}")
        print(f"in memory: {run(build, limit)}")


class Ran:
    """A finished process: exit status, seconds, peak resident set and peak private memory in bytes, last line of stderr."""

    def __init__(self, status: int, seconds: float, rss: int, data: int, last: str) -> None:
        self.status, self.seconds, self.rss, self.data, self.last = status, seconds, rss, data, last

    def __str__(self) -> str:
        text = (
            f"exit {self.status} after {self.seconds:.0f} s, peak RSS {self.rss / MIB:.0f} MiB, "
            f"private memory {self.data / MIB:.0f} MiB"
        )
        return f"{text} ({self.last})" if self.status else text


def run(arguments: list[str], limit: int | None) -> Ran:
    """Run Python in a process with at most ``limit`` bytes of private memory; None means no limit."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=limited
    )
    peaks = {"VmHWM": 0, "VmData": 0}

    def watch() -> None:
        # getrusage is not used, because its peak begins with the peak of the process that forked.
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, before in peaks.items():
                found = re.search(rf"{name}:\s+(\d+) kB", status)
                peaks[name] = max(before, int(found[1]) * 1024 if found else 0)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    lines = process.stderr.read().strip().splitlines()
    watcher.join()
    return Ran(process.wait(), time.monotonic() - began, peaks["VmHWM"], peaks["VmData"], lines[-1] if lines else "")


def write_model(directory: Path, blocks: int) -> int:
    """Write a checkpoint of random weights, one shard per block, and a tokenizer of characters. Returns its size in bytes."""
    directory.mkdir()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(directory)
    vocabulary = {text: index for index, text in enumerate(["<unk>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    total, names = 0, {}
    for number, tensors in enumerate(shards(blocks)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return total


def shards(blocks: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random tensors of the shards by name: first the embeddings and the head, then one block at a time."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    yield {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for number in range(blocks):
        name = f"model.layers.{number}"
        yield {
            **{f"{name}.self_attn.{part}_proj.weight": random(HIDDEN, HIDDEN) for part in "qkvo"},
            f"{name}.mlp.gate_proj.weight": random(WIDTH, HIDDEN),
            f"{name}.mlp.up_proj.weight": random(WIDTH, HIDDEN),
            f"{name}.mlp.down_proj.weight": random(HIDDEN, WIDTH),
            f"{name}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{name}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }


if __name__ == "__main__":
    main()
