"""Perplexity of several models on the same text, and lm-eval's tasks if they are asked for."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chanfmt.base.errors import UsageError
from chanfmt.base.inputs import file_size
from chanfmt.base.narrate import progress_bar, warn
from chanfmt.base.parsed import parse_json
from chanfmt.base.text import perplexity_text
from surgery.evaluation.answers import answers, read_prompts
from surgery.evaluation.given import check_given, check_running, given_model, given_models, given_text, runnable, text_name
from surgery.evaluation.measured import Evaluation
from surgery.evaluation.options import EvaluateOptions
from surgery.evaluation.protocol import PROTOCOLS, EvaluationTokens, before_text, prepare_text
from surgery.evaluation.side_by_side import Evaluations
from surgery.result.names import MAX_REPORT, REPORT_FILE
from surgery.result.record import REPORT_FORMAT

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from chanfmt.data.text import Text
    from chanfmt.models.source import ModelSource
    from surgery.evaluation.answers import Prompt
    from surgery.evaluation.given import GivenModel
    from surgery.evaluation.loaded import LoadedModel
    from surgery.evaluation.tasks import Tasks


FEWEST_BLOCKS = 20
"""Blocks below which a bootstrap interval covers the difference less often than it says."""
BOS_DIFFERENCE = 0.02
"""Relative difference of two perplexities above which a warning says that BOS matters."""


@dataclass(frozen=True)
class _Prepared:
    """A model before its weights are read."""

    name: str
    model: ModelSource | LoadedModel
    tokens: EvaluationTokens
    cut: dict[str, Any] | None
    before: tuple[int, ...]
    prompts: tuple[Prompt, ...]


def evaluate(
    models: GivenModel | Iterable[GivenModel],
    text: str | os.PathLike[str] | Text = "wikitext2",
    *,
    protocol: str = "paper",
    seq_len: int = 2048,
    max_tokens: int = 0,
    seed: int = 0,
    tasks: str | Sequence[str] | None = None,
    tasks_from: str | None = None,
    task_limit: int = 0,
    prompt: str | Sequence[str] = (),
    answer_tokens: int = 64,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Evaluations:
    """Evaluate every model on the same text, with one model at a time in memory.

    A model that is passed in memory stays on its device, in its dtype and in its mode.

    Args:
        models: One model or several. A model is a Hub id, a directory, a ``.gguf`` file, a `ModelSource`, a pair of a
            loaded transformers model and its tokenizer, or a `LoadedModel`, which is such a pair with a name.
        text: Name of a source as ``surgery eval --data`` takes it; a string with a line break, which is the text itself;
            or a `chanfmt.data.text.Text`.
        protocol: How the text becomes blocks of tokens: ``paper`` or ``common``, see `PROTOCOLS`.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens of the text to use at most; 0 means all.
        seed: Seed of the bootstrap that compares each model with the first one.
        tasks: Names of lm-eval's tasks to run too, as a sequence, or as text separated by commas.
        tasks_from: Directory with task files of your own.
        task_limit: Items to evaluate of each task; 0 means all.
        prompt: Prompts to answer too, by greedy decoding; one text, or several.
        answer_tokens: Tokens of an answer at most.
        device: Device of the models that are loaded here: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        device_map: ``auto`` spreads a model that is loaded here over all GPUs of the machine.
        dtype: Dtype of the models that are loaded here: ``auto``, ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        revision: Branch, tag or commit of the models on the Hub.

    Returns:
        One `Evaluation` per model, in order: perplexity, NLL in nats per token, bits per byte, speed and memory. If the
        tokenizer puts BOS before a text, also the perplexity with BOS at the beginning of every block.

    Raises:
        UsageError: An option is not possible, the text cannot be read, or a model is passed without its tokenizer.
        ModelError: A model cannot be fetched or loaded, is not causal, or has a context shorter than ``seq_len``.
        MissingPackageError: ``tasks`` without lm-eval, or ``device_map`` without accelerate.
        ChanfmtError: Memory ran out, or lm-eval failed.
    """
    given = given_models(models)
    options = EvaluateOptions(
        models=(),
        data=text_name(text),
        seq_len=seq_len,
        max_tokens=max_tokens,
        device=device,
        device_map=device_map,
        dtype=dtype,
        protocol=protocol,
        seed=seed,
        tasks=tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks),
        tasks_from=tasks_from,
        task_limit=task_limit,
        prompt=(prompt,) if isinstance(prompt, str) else tuple(prompt),
        answer_tokens=answer_tokens,
        revision=revision,
    )
    options.check()
    check_running(text, device)
    for model in given:
        check_given(model, revision=revision)
    loaded_tasks = None
    if options.task_names:
        from surgery.evaluation.tasks import Tasks

        loaded_tasks = Tasks(options.task_names, directory=tasks_from, limit=task_limit)
    read = given_text(text, empty_rows=PROTOCOLS[protocol].empty_rows)
    named = [given_model(model, revision=revision) for model in given]
    # Every model is prepared before the first one runs, so that a fault in the last one does not show after an hour.
    prepared = [_prepare(name, model, read, options) for name, model in named]
    evaluations: list[Evaluation] = []
    for item in prepared:
        evaluations.append(_evaluate_one(item, options, loaded_tasks, evaluations[0] if evaluations else None))
        # Models hold reference cycles. The memory of the next model should not include this one.
        gc.collect()
    if len({item.tokens.sha256 for item in evaluations}) > 1:
        # Two tokenizers reach different places in the text with the same number of tokens.
        others = "" if max_tokens else "; bits per byte do"
        warn(f"the models' tokenizers differ, so their losses per token do not compare{others}")
    compared = [item for item in evaluations if item.comparison]
    if compared and (fewest := min(len(item.losses.nll) for item in compared)) < FEWEST_BLOCKS:
        warn(
            f"the intervals are too narrow: they resample {fewest} block{'' if fewest == 1 else 's'}, and need {FEWEST_BLOCKS}; "
            f"use more text, or a shorter --seq-len than {seq_len}"
        )
    return Evaluations(tuple(evaluations), options.data, protocol, seq_len, max_tokens, seed)


def _prepare(name: str, model: ModelSource | LoadedModel, text: Text, options: EvaluateOptions) -> _Prepared:
    tokens = prepare_text(name, model, text, PROTOCOLS[options.protocol], options.seq_len, options.max_tokens)
    file = getattr(model, "file", None)
    cut = None if model.directory is None else _cut(model.directory) if file is None else _cut(file.parent, file.name)
    prompts = read_prompts(name, model, options.prompt, options.answer_tokens)
    return _Prepared(name, model, tokens, cut, before_text(model, options.seq_len), prompts)


def _evaluate_one(prepared: _Prepared, options: EvaluateOptions, tasks: Tasks | None, first: Evaluation | None) -> Evaluation:
    from surgery.evaluation.memory import PeakMemory
    from surgery.evaluation.perplexity import block_losses, paired_bootstrap

    tokens = prepared.tokens
    with runnable(prepared.model, dtype=options.dtype, device=options.device, device_map=options.device_map) as model:
        memory = PeakMemory(model)
        with progress_bar(len(tokens.ids) * (2 if prepared.before else 1), "tok", Path(prepared.name).name) as bar:
            times = [(0, time.monotonic())]

            def step(count: int) -> None:
                times.append((times[-1][0] + count, time.monotonic()))
                bar.update(count)

            losses = block_losses(model, tokens.ids, options.seq_len, progress=step, name=prepared.name)
            peak, host_peak = memory.bytes(), memory.host_bytes()
            with_bos = None
            if prepared.before:
                with_bos = block_losses(
                    model, tokens.ids, options.seq_len, before=prepared.before, progress=bar.update, name=prepared.name
                )
        if with_bos:
            _warn_of_bos(prepared.name, losses.perplexity, with_bos.perplexity)
        comparison = None
        if first and first.tokens.sha256 == tokens.sha256:
            comparison = paired_bootstrap(first.losses, losses, seed=options.seed)
        (skipped, since), (total, until) = times[1 if len(times) > 2 else 0], times[-1]
        return Evaluation(
            model=prepared.name,
            fingerprint=prepared.model.fingerprint,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            tokens=tokens,
            losses=losses,
            comparison=comparison,
            before=prepared.before,
            with_bos=with_bos,
            seconds=until - times[0][1],
            tokens_per_second=(total - skipped) / max(until - since, 1e-9),
            peak_memory_bytes=peak,
            memory=memory.kind,
            host_peak_memory_bytes=host_peak,
            cut=prepared.cut,
            tasks=tasks.run(model, prepared.model.tokenizer) if tasks else (),
            answers=answers(
                model, prepared.model.tokenizer, prepared.prompts, options.answer_tokens, name=Path(prepared.name).name
            )
            if prepared.prompts
            else (),
        )


def _warn_of_bos(name: str, without: float, with_bos: float) -> None:
    """Warn if BOS changes the perplexity: the protocol then measures another model than the one that users meet."""
    if not abs(with_bos / without - 1) <= BOS_DIFFERENCE:
        warn(
            f"{name}: the perplexity is {perplexity_text(with_bos)} if every block begins with BOS, as its tokenizer begins a "
            f"text, and {perplexity_text(without)} by the protocol, which does not repeat BOS"
        )


class _CutLayer(msgspec.Struct):
    supernodes: int
    supernodes_removed: int


class _Format(msgspec.Struct):
    format: str = ""


class _CutFile(msgspec.Struct):
    file: str


class _Cut(msgspec.Struct):
    """The parts of a ``surgery.json`` that an evaluation shows."""

    method: str
    protect: list[str]
    layers: list[_CutLayer]
    gguf: _CutFile | None = None


def _cut(directory: Path, file: str | None = None) -> dict[str, Any] | None:
    """What the record in ``directory`` says of the cut; None for a model that was not cut.

    Args:
        file: Name of the GGUF file that is evaluated; None for the checkpoint in ``directory``.

    Raises:
        UsageError: The record is damaged.
    """
    path = directory / REPORT_FILE
    try:
        if file_size(path) > MAX_REPORT:
            raise ValueError(f"it is larger than {MAX_REPORT >> 20} MB")
        text = path.read_bytes()
        # A model that was restored has a record of another format.
        if parse_json(text, _Format).format != REPORT_FORMAT:
            return None
        stored = parse_json(text, _Cut)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged: {error}", hint="cut the model again, or remove the file to evaluate the model without it"
        ) from None
    if file is not None and (stored.gguf is None or stored.gguf.file != file):
        return None
    return {
        "method": stored.method,
        "protect": stored.protect,
        "supernodes": sum(layer.supernodes for layer in stored.layers),
        "supernodes_removed": sum(layer.supernodes_removed for layer in stored.layers),
    }
