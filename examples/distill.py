"""Distil a cut model towards its dense model with the Trainer of transformers, for as long as you like.

    python examples/distill.py DENSE CUT TEXT OUT [--steps 200] [--length 512] [--batch 4] [--rate 1e-4] [--everything]

DENSE and CUT are directories or Hub ids: the model that was cut, and the result of `surgery prune`. The loss is the
Kullback-Leibler divergence of the cut model's next-token distribution from the dense model's, over all positions of TEXT. No
labels are needed. Every eighth sequence is held out, and the divergence there is printed before and after. The FFNs are
trained, or all weights with --everything. Start it with `accelerate launch` for several GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging


class Distiller(Trainer):
    """A `Trainer` whose loss is KL(teacher || model) in nats per token."""

    def __init__(self, teacher: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        # The loss is a mean over tokens already.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **ignored: Any) -> Any:
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        outputs = model(inputs["input_ids"], use_cache=False)
        found = outputs.logits.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


def rows_of(text: str, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """The tokens of ``text`` in sequences of ``length``; what is left over at the end is not used."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    # Trainer measures a loss only on data with labels.
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("cut")
    parser.add_argument("text", type=Path)
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--everything", action="store_true")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.cut)
    rows = rows_of(options.text.read_text(encoding="utf-8"), tokenizer, options.length)
    held_out, fitted = rows[7::8], [row for number, row in enumerate(rows) if number % 8 != 7]
    if not held_out:
        raise SystemExit(f"{options.text} has {len(rows)} sequences of {options.length} tokens, and 8 are needed")
    teacher, student = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (options.dense, options.cut))
    if not options.everything:
        for name, parameter in student.named_parameters():
            # The names of the FFNs of most model types. surgery.json lists those of yours.
            parameter.requires_grad_(any(part in name for part in (".mlp.", ".fc1.", ".fc2.", ".feed_forward.", ".ffn.")))
    trainer = Distiller(
        teacher,
        model=student,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 10),
            prediction_loss_only=True,
            save_strategy="no",
            logging_steps=max(1, options.steps // 10),
            report_to=[],
            seed=0,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=fitted,
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"KL on {len(held_out)} held-out sequences: {before:.4f} to {after:.4f} nats/token; wrote {options.out}")


if __name__ == "__main__":
    main()
