"""Heal a cut model: train it until it predicts again what the dense model predicts, and measure both before and after.

    python examples/heal.py DENSE CUT -o OUT [--train lora|ffn|all] [--labels] [--minutes 2 | --steps 200]

DENSE is the model that was cut (a Hub id, a directory or a .gguf file), and CUT is the result of `surgery prune`. The loss is the
Kullback-Leibler divergence of the cut model's next-token distribution from the dense model's, over all positions, so no labels
are needed; with --labels it is the loss of the next token of the text. `--train lora` adds low-rank matrices to all linear layers
(with peft: pip install peft) and merges them at the end. `ffn` trains the FFNs, which were cut, and `all` trains all weights.

OUT is a checkpoint that stock transformers loads, in the dtype of CUT. The tables compare the three models on text that nobody
trained on: the held-out part of --text (of a file, its last tenth), and --other, a text of another kind. For several GPUs, start
the script with `accelerate launch` and give --steps.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import surgery
from chanfmt.data.text import read_text
from chanfmt.hub.locate import locate_model

FILES = (".txt", ".jsonl", ".parquet")
FFN = (".mlp.", ".fc1.", ".fc2.", ".feed_forward.", ".ffn.")
"""Parts of the names of the FFNs of most model types. surgery.json lists those of yours."""
RATES = {"lora": 1e-3, "ffn": 1e-4, "all": 1e-4}
HELD_OUT_ROWS = 8


class Healer(Trainer):
    """A `Trainer` whose loss is KL(teacher || model) in nats per token, or, without a teacher, that of the next token.

    Args:
        share: Function of a step that gives the share of the training that is done, for the learning rate.
    """

    def __init__(self, teacher: Any, share: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.share = share
        # The loss is a mean over tokens already.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **ignored: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        found = outputs.logits.float().log_softmax(-1)
        if self.teacher is None:
            loss = torch.nn.functional.nll_loss(found[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm up for three steps, then fall along a cosine to the end of the steps or of the minutes."""

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share(step))))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler


class Clock(TrainerCallback):
    """Ends the training after ``minutes``."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.started = math.nan

    def share(self, step: int) -> float:
        """Share of the time that is over."""
        return 0.0 if math.isnan(self.started) else (time.monotonic() - self.started) / self.seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.share(0) >= 1


def parts(source: str) -> tuple[str, str]:
    """The text to train on, and what `surgery.evaluate` takes as the held-out text."""
    text = read_text(source, "calibrate").text
    if not source.endswith(FILES):
        return text, source
    end = text.rfind("\n", 0, len(text) * 9 // 10) + 1
    if not end:
        raise SystemExit(f"{source} has too few lines to hold some out")
    return text[:end], text[end:]


def rows_of(text: str, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """The tokens of ``text`` in sequences of ``length``; what is left over at the end is not used."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    # Trainer measures a loss only on data with labels.
    return [{"input_ids": row, "labels": row} for row in rows]


def prepared(student: Any, train: str, rank: int) -> Any:
    """``student`` with the parameters that are trained."""
    if train == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise SystemExit("--train lora needs peft: pip install peft; --train ffn and --train all do not") from None
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(student, config)
    if train == "ffn":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(any(part in name for part in FFN))
    return student


def table(options: argparse.Namespace, texts: dict[str, str]) -> None:
    """Print the losses of the three models on every text."""
    print(f"\n{'text':<24}{'dense':>9}{'cut':>9}{'healed':>9}  of the gap closed   (nats per token)")
    for name, text in texts.items():
        models = [options.dense, options.cut, options.out]
        found = surgery.evaluate(models, text, seq_len=options.length, max_tokens=options.eval_tokens, progress=False)
        dense, cut, healed = (evaluation.losses.mean for evaluation in found)
        closed = f"{(cut - healed) / (cut - dense):.0%}" if cut > dense else "-"
        print(f"{name[-23:]:<24}{dense:>9.4f}{cut:>9.4f}{healed:>9.4f}  {closed:>17}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("cut")
    parser.add_argument("-o", dest="out", required=True, help="directory to write")
    parser.add_argument("--train", choices=sorted(RATES), default="lora")
    parser.add_argument("--labels", action="store_true", help="learn the text in place of the dense model's predictions")
    parser.add_argument("--text", default="wikitext2", help="text to train on, as surgery eval --data takes it")
    parser.add_argument("--other", default="pydoc", help="text of another kind, to measure on only; none for none")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for so long (default: 200 steps)")
    length.add_argument("--steps", type=int)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--rate", type=float, help=f"learning rate (default: {RATES})")
    parser.add_argument("--rank", type=int, default=16, help="rank of the matrices of LoRA")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    options = parser.parse_args()
    if Path(options.out).exists():
        raise SystemExit(f"{options.out} exists; remove it, or choose another -o")
    if options.minutes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("the clocks of several processes differ; give --steps in place of --minutes")
    return options


def main() -> None:
    options = parsed()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.cut)
    text, held_out = parts(options.text)
    rows = rows_of(text, tokenizer, options.length)
    if len(rows) <= HELD_OUT_ROWS:
        raise SystemExit(
            f"{options.text} has {len(rows)} sequences of {options.length} tokens, and {HELD_OUT_ROWS + 1} are needed"
        )
    apart = len(rows) // HELD_OUT_ROWS
    tested = rows[::apart][:HELD_OUT_ROWS]
    fitted = [row for place, row in enumerate(rows) if place % apart or place >= apart * HELD_OUT_ROWS]
    dtype = AutoConfig.from_pretrained(options.cut).dtype or torch.float32
    student = AutoModelForCausalLM.from_pretrained(options.cut, dtype=torch.float32)
    # A .gguf file has a directory of its own in the cache.
    dense = locate_model(options.dense).directory
    teacher = None if options.labels else AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    student = prepared(student, options.train, options.rank)
    steps = options.steps or (1_000_000 if options.minutes else 200)
    clock = Clock(options.minutes or math.inf)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Healer(
            teacher,
            clock.share if options.minutes else lambda step: step / steps,
            model=student,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=options.batch,
                learning_rate=options.rate or RATES[options.train],
                prediction_loss_only=True,
                save_strategy="no",
                logging_steps=max(1, min(steps // 10, 50)),
                report_to=[],
                seed=0,
                bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=fitted,
            eval_dataset=tested,
            callbacks=[clock],
        )
        before = trainer.evaluate()["eval_loss"]
        trained = trainer.train()
        after = trainer.evaluate()["eval_loss"]
    if not trainer.is_world_process_zero():
        return
    student = trainer.accelerator.unwrap_model(student)
    if options.train == "lora":
        student = student.merge_and_unload()
    partial = Path(f"{options.out}.partial")
    student.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(options.out)
    seconds, what = trained.metrics["train_runtime"], "loss" if options.labels else "KL"
    print(f"{trained.global_step} steps of {options.batch} x {options.length} tokens in {seconds:.0f} s; wrote {options.out}")
    print(f"{what} on {len(tested)} held-out sequences: {before:.4f} to {after:.4f} nats/token")
    texts = {f"{Path(options.text).name} (held out)": held_out}
    if options.other != "none":
        texts[f"{Path(options.other).name}"] = options.other
    table(options, texts)


if __name__ == "__main__":
    main()
