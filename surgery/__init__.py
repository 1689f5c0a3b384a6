"""Remove the FFN channels of a model that matter least according to its importance atlas, and measure the result.

`shrink` goes from a model and a size to a smaller model that is checked, compared and judged. The other functions are its
steps, and what a step alone cannot do.

A function that takes an atlas takes it open (from `chanfmt.open` or `chanfmt.build`), as a path, or as an address on the
Hub. A model is a Hub id, a directory or a ``.gguf`` file. `prune_`, `evaluate`, `sweep`, `ablate` and `replaceability` take
a loaded transformers model too.

>>> import surgery
>>> plan = surgery.plan("smollm2.h5", sparsity=0.5)  # doctest: +SKIP
>>> result = surgery.prune("HuggingFaceTB/SmolLM2-135M", "smollm2.h5", "half", sparsity=0.5)  # doctest: +SKIP
>>> surgery.evaluate(["HuggingFaceTB/SmolLM2-135M", "half"], "wikitext2")  # doctest: +SKIP

A sparsity is a share of channels between 0 and 1. Losses are in nats per token. Failures that a user can mend are
`chanfmt.ChanfmtError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from surgery.evaluation.loaded import LoadedModel

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from chanfmt.data.text import Text
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.publish import Published
    from chanfmt.models.source import ModelSource
    from surgery.cli.shrinking.outcome import Shrunk
    from surgery.cut.in_place import Narrowed
    from surgery.evaluation.given import GivenModel
    from surgery.evaluation.side_by_side import Evaluations
    from surgery.experiments.ablation.run import Ablation
    from surgery.experiments.replaceability import Replaceability
    from surgery.experiments.sweep import SweepResults
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import RecoveryOptions
    from surgery.result.result import Result

    Given = Atlas | str | os.PathLike[str]
    Model = ModelSource | str | os.PathLike[str]

__all__ = ["LoadedModel", "ablate", "apply", "evaluate", "plan", "prune", "prune_", "push", "replaceability", "shrink", "sweep"]


def plan(
    atlas: Given,
    sparsity: float | None = None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    method: str = "scar-prot",
    protect: str | Iterable[str] = (),
    unprotect: str | Iterable[str] = (),
    allocation: str = "uniform",
    max_layer_sparsity: float | None = None,
    layers: str | int | Iterable[int] | None = None,
    stack: str | Iterable[str] = (),
    invert: bool = False,
    multiple_of: int | None = None,
    seed: int = 0,
    layout: str = "auto",
) -> PruningPlan:
    """Decide which channels a cut removes, from the atlas alone. No model is read, and torch is not imported.

    Args:
        atlas: A complete atlas.
        sparsity: Share of the FFN channels to remove (default: 0.5, unless ``to`` names a size).
        to: Size of the result: ``75%`` of the model's parameters, ``6B`` or ``100M`` parameters, ``12GB`` or ``300MB`` of
            weights. The result is at that size, or as close below as rounded widths allow.
        dtype: Dtype of the result, for a ``to`` in bytes; None for the model's.
        method: Score that ranks the channels: ``scar-prot``, ``scar-lp``, ``scar-conn``, ``taylor``, ``activation``,
            ``wanda``, ``wanda-group``, ``flap``, ``magnitude``, ``random``. Channels with low scores go first.
        protect: Channels that are never removed, as ``--protect`` takes them: ``supernodes``, ``supernodes+halo``,
            ``top:METRIC=2%``, ``LAYER:IDS``, or a file. Several are a union.
        unprotect: Channels to take out of that union, and out of what the method protects.
        allocation: ``uniform`` removes the same share of every FFN; ``global`` removes the lowest scores of all FFNs.
        max_layer_sparsity: Largest share of one FFN that ``global`` removes (default: 0.7).
        layers: Layers to cut, as numbers or as text such as ``0-7,12``; None for all.
        stack: Stacks to cut; empty for all.
        invert: Whether to remove exactly the channels that would be kept.
        multiple_of: Round kept widths to a multiple of this (default: the largest of 256, 128 and 64 that moves the
            kept width by less than 2%, or 32).
        seed: Seed of the method ``random``.
        layout: Config of a result with uneven widths. ``uniform``: the fields of the stock class, with zero channels where
            FFNs share a field. ``deci``: a Llama model as DeciLM, with a width for each layer and a modelling file.
            ``custom``: a causal language model of any type, with a width for each FFN and a modelling file.
            ``auto``: ``uniform`` if no FFN is padded then, otherwise ``deci`` if the model is of its kind.

    Returns:
        The plan: the ids of the kept channels of every FFN (int arrays of shape (kept,), or (expert, kept)), and what the
        cut costs in channels and LP. Its ``warnings`` are cautions in sentences. `apply` carries out the plan on the model's
        files, and `prune_` in memory.

    Raises:
        chanfmt.UsageError: An option has no meaning for this model, or the protected channels do not fit.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what the method needs.
    """
    from chanfmt.hub.locate import opened
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import make_plan

    options = PlanOptions(
        _default_sparsity(sparsity, to),
        method,
        protect,  # type: ignore[arg-type]
        unprotect,  # type: ignore[arg-type]
        allocation,
        max_layer_sparsity,
        layers,  # type: ignore[arg-type]
        stack,  # type: ignore[arg-type]
        invert,
        multiple_of,
        seed,
        to,
        _dtype_name(dtype),
        layout,
    )
    options.check()
    with opened(atlas) as given:
        return make_plan(given, options)


def prune(
    model: Model | None,
    atlas: Given,
    out: str | os.PathLike[str] | None = None,
    *,
    sparsity: float | None = None,
    to: str | None = None,
    recover: str = "none",
    recover_text: str | Sequence[str] = (),
    recover_tokens: str | int = "128k",
    recover_steps: int | None = None,
    recover_start: str = "block",
    recover_device: str = "auto",
    verify: bool = True,
    shard_bytes: int | None = None,
    dtype: str | None = None,
    extra_layers: str | None = None,
    allow_padding: bool = False,
    format: str = "safetensors",
    quant: str | None = None,
    cut_quant: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
    **planning: Any,
) -> Result:
    """Cut a model and write the smaller checkpoint, which ``from_pretrained`` loads.

    Stock code loads the result, unless its layout is ``deci`` or ``custom``: then ``trust_remote_code=True`` is needed.

    The checkpoint is streamed tensor by tensor, and published whole or not at all. Before ``out`` gets its name, its shapes
    are checked against the stock class, and its logits against those of the dense model with the same channels masked
    (relative error at most 1e-4).

    Args:
        model: The model that the atlas measured. None for the model that the atlas names, from the Hub.
        atlas: A complete atlas of the model. The result gets a copy.
        out: Directory to write (default: MODEL-METHOD-PERCENT in the working directory).
        sparsity: Share of the FFN channels to remove (default: 0.5, unless ``to`` names a size).
        to: Size of the result, as for `plan`.
        recover: How the kept channels are refitted, without labels: ``none``, ``bias``, ``lstsq``, ``block`` or ``distill``.
            If a long refit is interrupted, the same call continues from ``OUT.partial``.
        recover_text: Text to refit on, as ``--calib`` of ``atlas build`` takes it; empty for the atlas's own tokens.
        recover_tokens: Tokens to draw from ``recover_text``.
        recover_steps: Steps of ``distill``; None for a number that follows from the tokens.
        recover_start: What ``distill`` starts from: ``block`` or ``lstsq``.
        recover_device: Device of the refit: ``auto``, ``cpu``, ``cuda``, ...
        verify: Whether to compare logits. Shapes are always checked.
        shard_bytes: Largest size of a weights file in bytes; None for files that correspond to the model's.
        dtype: Float that the result's tensors are rounded to: ``float32``, ``bfloat16`` or ``float16``; None to leave them as
            they are stored.
        extra_layers: What becomes of layers that transformers does not load (multi-token prediction) and that have the width
            of an FFN that is cut: ``cut`` narrows them by the norms of their weights, ``drop`` leaves them out, None refuses.
        allow_padding: Whether to cut even if the file shrinks by less than half of what was asked, because zero channels take
            the place of removed ones.
        format: ``safetensors``, or ``gguf`` for one file of llama.cpp, if the model is a ``.gguf`` file or a checkpoint of a Llama,
            Mistral, Qwen2, Qwen3 or Gemma 3.
        quant: Type of all matrices of a GGUF result: ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1``, ``q4_0``, ``bf16``, ``f16`` or
            ``f32``; None for the types of the source.
        cut_quant: Type of the matrices of a GGUF result that are quantised again, because the cut or ``recover`` changes them;
            None for ``quant``, or without that for their own types, and ``q5_0`` in place of four bits.
        imatrix: Importance matrix of the dense model, from llama-imatrix or ``atlas export``. The result gets one of the kept
            channels.
        overwrite: Whether an earlier result in ``out`` is replaced.
        revision: Branch, tag or commit on the Hub, in place of the measured one.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.
        planning: Further arguments of `plan`, such as ``method``, ``protect`` and ``layout``.

    Returns:
        The result: its directory, and the record of what was removed, written and checked.

    Raises:
        chanfmt.UsageError: An option has no meaning for this model, or ``out`` cannot be written.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what an option needs.
        chanfmt.ModelError: The model is not the model of the atlas, or stock code could not load the result.
        chanfmt.CheckError: The result did not pass its checks. Nothing is left behind.
    """
    from chanfmt.base.narrate import bars
    from chanfmt.hub.locate import opened
    from surgery.cut.options import CutOptions
    from surgery.cut.prune import prune as prune_files
    from surgery.planning.options import PlanOptions

    _check_loaded(model)
    _check_names("prune", planning, PlanOptions)
    plan_options = PlanOptions(_default_sparsity(sparsity, to), to=to, dtype=_dtype_name(dtype), **planning)
    plan_options.check()
    cut_options = CutOptions(
        overwrite=overwrite,
        verify=verify,
        shard_bytes=shard_bytes,
        extra_layers=extra_layers,
        dtype=_dtype_name(dtype),
        allow_padding=allow_padding,
        format=format,
        quant=quant,
        cut_quant=cut_quant,
        imatrix=_file(imatrix),
    )
    cut_options.check()
    recovery = _recovery(recover, recover_device, recover_text, recover_tokens, recover_steps, recover_start)
    with bars(progress), opened(atlas) as given:
        return prune_files(given, model, out, plan_options, cut_options, recovery, revision=revision)


def apply(
    plan: PruningPlan | str | os.PathLike[str],
    model: Model | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    atlas: Given | None = None,
    recover: str = "none",
    recover_text: str | Sequence[str] = (),
    recover_tokens: str | int = "128k",
    recover_steps: int | None = None,
    recover_start: str = "block",
    recover_device: str = "auto",
    verify: bool = True,
    fine_tune: bool = False,
    shard_bytes: int | None = None,
    dtype: str | None = None,
    extra_layers: str | None = None,
    allow_padding: bool = False,
    layout: str | None = None,
    format: str = "safetensors",
    quant: str | None = None,
    cut_quant: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
) -> Result:
    """Cut a model as a plan says and write the smaller checkpoint, as `prune` does.

    Args:
        plan: From `plan`, or a file from ``surgery plan -o``.
        model: The plan's model, or with ``fine_tune`` a fine-tune of it. None for the model that the plan names, from the
            Hub.
        out: Directory to write (default: MODEL-METHOD-PERCENT in the working directory).
        atlas: The atlas that the plan was made from. ``recover`` needs it, and the result gets a copy.
        recover, recover_text, recover_tokens, recover_steps, recover_start, recover_device: As for `prune`.
        verify, shard_bytes, dtype, extra_layers, allow_padding, overwrite, revision, progress: As for `prune`.
        format, quant, cut_quant, imatrix: As for `prune`.
        layout: Layout in place of the plan's, as for `plan`; None for the plan's.
        fine_tune: Whether other weights than the measured ones are accepted: those of a fine-tune, perhaps with another head.

    Returns:
        The result: its directory, and the record of what was removed, written and checked.

    Raises:
        chanfmt.UsageError: The plan cannot be read, ``out`` cannot be written, or ``recover`` lacks the atlas.
        chanfmt.AtlasError: The plan was made from another atlas.
        chanfmt.ModelError: The model is not the model of the plan, or stock code could not load the result.
        chanfmt.CheckError: The result did not pass its checks. Nothing is left behind.
    """
    import os

    from chanfmt.base.inputs import input_path
    from chanfmt.base.narrate import bars
    from surgery.cut.options import CutOptions
    from surgery.cut.prune import apply_file
    from surgery.planning.plan import PruningPlan

    if not isinstance(plan, PruningPlan | str | os.PathLike):
        raise _not_a_plan(plan)
    _check_loaded(model)
    recovery = _recovery(recover, recover_device, recover_text, recover_tokens, recover_steps, recover_start)
    cut_options = CutOptions(
        overwrite,
        verify,
        fine_tune,
        shard_bytes,
        extra_layers,
        _dtype_name(dtype),
        allow_padding,
        layout,
        format,
        quant,
        _file(imatrix),
        cut_quant,
    )
    cut_options.check()
    given = plan if isinstance(plan, PruningPlan) else input_path(plan)
    with bars(progress):
        return apply_file(given, model, out, cut_options, recovery, revision=revision, atlas=atlas)


def prune_(model: Any, plan: PruningPlan, *, allow_padding: bool = False) -> Narrowed:
    """Remove from a loaded transformers model, in place, the channels that a plan does not keep.

    Weights, biases, the sizes that the modules know (such as ``out_features``) and the config change. ``save_pretrained``
    then writes the tensors that `apply` writes for the same plan. Devices, dtypes and the training mode stay. The
    gradients of the changed parameters are dropped: make the optimizer anew. A model in memory keeps its class, so FFNs of
    uneven widths are padded with zero channels, whatever the plan's layout is.

    Args:
        model: A ``transformers.PreTrainedModel``. Nothing can tell whether its weights are those that the atlas measured.
        plan: From `plan`.
        allow_padding: As for `prune`.

    Returns:
        The numbers of channels and parameters before and after, and the config fields that changed.

    Raises:
        chanfmt.ModelError: The model is not the plan's (another model type, other FFNs or shapes), is quantised, sharded or
            not in memory, or its class cannot have the planned widths. The model is then unchanged.
        chanfmt.UsageError: ``plan`` is not a plan, or the model would hardly shrink.
    """
    from surgery.cut.in_place import prune_ as narrow
    from surgery.planning.plan import PruningPlan

    if not isinstance(plan, PruningPlan):
        raise _not_a_plan(plan)
    return narrow(model, plan, allow_padding=allow_padding)


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
    progress: bool | None = None,
) -> Evaluations:
    """Measure the perplexity of every model on the same text, with one model at a time in memory.

    Args:
        models: One model or several. A model is a Hub id, a directory, a ``.gguf`` file, or a pair of a loaded transformers
            model and its tokenizer; a `LoadedModel` is such a pair with a name. A loaded model is left as it was.
        text: A source as ``surgery eval --data`` takes it (``wikitext2``, ``pydoc``, a file, a data set), or a string with a
            line break, which is the text itself.
        protocol: How the text becomes blocks of tokens: ``paper``, or ``common``, which other tools use.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens of the text to use at most; 0 means all.
        seed: Seed of the bootstrap that compares each model with the first one.
        tasks: Tasks of lm-eval to run too, as names or as text such as ``arc_easy,piqa``.
        tasks_from: Directory with task files of your own.
        task_limit: Items to evaluate of each task; 0 means all.
        prompt: Prompts to answer too, by greedy decoding, in the chat template of a model that has one; one text, or several.
        answer_tokens: Tokens of an answer at most.
        device, dtype: For models that are loaded here: ``auto``, ``cuda:1``, ...; ``auto``, ``float32``, ``bfloat16``, ...
        device_map: ``auto`` spreads a model that is loaded here over all GPUs of the machine; this needs accelerate.
        revision: Branch, tag or commit of the models on the Hub.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.

    Returns:
        A sequence of one evaluation per model: perplexity, loss in nats per token, bits per byte, speed and memory, and the
        comparison with the first model.

    Raises:
        chanfmt.UsageError: An option is not possible, the text cannot be read, or a model lacks its tokenizer.
        chanfmt.ModelError: A model cannot be loaded, is not causal, or has a context shorter than ``seq_len``.
        chanfmt.MissingPackageError: ``tasks`` without lm-eval (``pip install 'chanfmt[eval]'``).
        chanfmt.ChanfmtError: Memory ran out, or lm-eval failed.
    """
    from chanfmt.base.narrate import bars
    from surgery.evaluation.evaluate import evaluate as evaluate_models

    with bars(progress):
        return evaluate_models(
            models,
            text,
            protocol=protocol,
            seq_len=seq_len,
            max_tokens=max_tokens,
            seed=seed,
            tasks=tasks,
            tasks_from=tasks_from,
            task_limit=task_limit,
            prompt=prompt,
            answer_tokens=answer_tokens,
            device=str(device),
            device_map=device_map,
            dtype=str(dtype).removeprefix("torch."),
            revision=revision,
        )


def sweep(
    atlas: Given,
    model: GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    out: str | os.PathLike[str] | None = None,
    *,
    methods: str | Sequence[str] = "scar-prot,wanda,activation,magnitude,random",
    sparsity: str | float | Sequence[float] | None = None,
    to: str | Sequence[str] | None = None,
    protect: str | Sequence[str] = ("none",),
    recover: str | Sequence[str] = "none",
    recover_text: str | Sequence[str] = (),
    recover_tokens: str | int = "128k",
    recover_steps: int | None = None,
    seeds: str | int | Sequence[int] = "0",
    allocation: str = "uniform",
    max_layer_sparsity: float | None = None,
    layers: str | Sequence[int] | None = None,
    stack: str | Sequence[str] = (),
    multiple_of: int | None = None,
    layout: str = "auto",
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: bool | None = None,
) -> SweepResults:
    """Measure the perplexity of every combination of method, protection, sparsity and recovery. No checkpoint is written.

    The channels are masked in one loaded model, which is afterwards as it was. Every cut is planned before the model is
    loaded.

    Args:
        atlas: A complete atlas of the model.
        model: A model as `evaluate` takes it. None for the model that the atlas names, from the Hub.
        text: A text as `evaluate` takes it.
        out: Directory for ``results.csv`` and ``results.json``; rows that it holds are not measured again. None keeps the
            rows in memory.
        methods: Scores to compare, as names or as text such as ``scar-prot,wanda``.
        sparsity: Shares of channels to remove: numbers, or text such as ``0.1:0.7:0.1`` (first, last, step), the default.
        to: Sizes of the cut model in place of ``sparsity``, each as for `plan`.
        protect: Protections to run every method under, each as in `plan`.
        recover: Recoveries to compare: ``none``, ``bias``, ``lstsq``, ``block``, ``distill``. The last three need the files of
            the model.
        recover_text, recover_tokens, recover_steps: As for `prune`.
        seeds: Seeds of the method ``random``.
        allocation, max_layer_sparsity, layers, stack, multiple_of, layout: As for `plan`.
        seq_len, max_tokens, device, device_map, dtype: As for `evaluate`.
        overwrite: Whether the rows that ``out`` holds are dropped.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.

    Returns:
        One row per cut, the dense model first. ``pandas.DataFrame(results.rows)`` makes a table of the rows, and
        ``results.plot()`` draws perplexity against sparsity.

    Raises:
        chanfmt.UsageError: An option or a plan is not possible, or the rows in ``out`` were measured differently.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what a method needs.
        chanfmt.ModelError: The model cannot be loaded, or is not the model of the atlas.
        KeyboardInterrupt: Ctrl-C. Finished rows stay in ``out``.
    """
    from chanfmt.base.narrate import bars
    from chanfmt.hub.locate import opened
    from surgery.experiments.sweep import sweep as sweep_cuts

    with bars(progress), opened(atlas) as given:
        return sweep_cuts(
            given,
            model,
            text,
            methods=methods,
            sparsity=sparsity,
            to=to,
            protect=protect,
            recover=recover,
            recover_text=recover_text,
            recover_tokens=recover_tokens,
            recover_steps=recover_steps,
            seeds=seeds,
            allocation=allocation,
            max_layer_sparsity=max_layer_sparsity,
            layers=layers,
            stack=stack,
            multiple_of=multiple_of,
            layout=layout,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=str(device),
            device_map=device_map,
            dtype=str(dtype).removeprefix("torch."),
            output=out,
            overwrite=overwrite,
        )


def shrink(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    calib: str | os.PathLike[str] | None = None,
    atlas: Given | None = None,
    sequences: int = 64,
    seq_len: int = 512,
    methods: str | Sequence[str] = ("scar-lp", "activation"),
    allocations: str | Sequence[str] = ("uniform",),
    try_recover: str = "lstsq",
    try_tokens: int = 4096,
    recover: str | None = None,
    held_out: str | os.PathLike[str] | None = None,
    other: str | os.PathLike[str] | None = None,
    eval_tokens: int = 16384,
    device: str = "auto",
    dtype: str | None = None,
    format: str | None = None,
    quant: str | None = None,
    cut_quant: str | None = None,
    layout: str = "auto",
    push: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Shrunk:
    """Make a model smaller: measure it, try a few cuts, apply the best one, recover it, and compare both models.

    Each step runs as a command in a process of its own, and its result stays in ``OUT.work``. After an interruption, the same
    call goes on at the first step that is not done.

    Args:
        model: Hub id, directory or ``.gguf`` file of a causal language model.
        to: Size of the result, as for `plan`.
        out: Directory to write. Its steps' results go to the directory ``OUT.work`` beside it.
        calib: Text to measure the model on, as ``--calib`` of ``atlas build`` takes it; None for ``wikitext2``.
        atlas: A complete atlas of the model, to use in place of building one.
        sequences: Calibration sequences.
        seq_len: Tokens of a sequence, and of a block of evaluation.
        methods: Methods to try.
        allocations: Allocations to try.
        try_recover: Recovery of the cuts that are tried.
        try_tokens: Held-out tokens that the tried cuts are measured on.
        recover: Recovery of the best cut; None for the best recovery that we know.
        held_out: Text of the calibration's kind that was not measured; None for the part of ``calib`` that is kept for
            evaluation, or the last tenth of a file.
        other: Text of another kind, or ``none``; None for ``pydoc``, or ``wikitext2`` if the calibration text is ``pydoc``.
        eval_tokens: Tokens of each text to measure at most.
        device: Device of every step: ``auto``, ``cpu``, ``cuda``, ...
        dtype: Dtype of the weights of a checkpoint; None for ``bfloat16`` if the model is a ``.gguf`` file, otherwise as stored.
        format: ``safetensors`` or ``gguf``, as for `prune`; None for ``gguf`` if the model is a ``.gguf`` file and no other
            argument needs a checkpoint (``dtype``, ``allocations`` without ``uniform``, the layout ``deci`` or ``custom``).
        quant, cut_quant, layout: As for `prune`.
        push: Repository to publish the result in: ``USER/NAME``, ``NAME``, or an empty text for the default name. None
            publishes nothing.
        public: Whether everyone can see the repository.
        create_pr: Whether to open a pull request in an existing repository instead of committing to it.
        overwrite: Whether to begin again, and to replace what another call left in ``out`` and ``OUT.work``.
        progress: Whether the steps write their notes and progress bars to stderr; None lets them if stderr is a terminal.

    Returns:
        The result, the steps with their command lines and seconds, the cuts that were tried, the verdict with the losses on
        every text and both models' answers, and the next commands. ``to_json()`` gives what ``surgery shrink --json`` prints.

    Raises:
        chanfmt.UsageError: An option is not possible, no cut reaches the size, or ``out`` holds something else.
        chanfmt.ModelError: The model cannot be read, or is not a causal language model.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what a method needs.
        chanfmt.ChanfmtError: A step failed; the message has its error. What is done stays in ``OUT.work``.
        KeyboardInterrupt: Ctrl-C. The same call goes on.
    """
    import os

    from chanfmt.base.narrate import bars, bars_shown
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.locate import model_name
    from chanfmt.hub.names import check_repo
    from chanfmt.hub.publish import check_login
    from surgery.cli.shrinking import options
    from surgery.cli.shrinking.shrink import foresee
    from surgery.cli.shrinking.shrink import shrink as run
    from surgery.recovery.options import BEST_RECOVERY

    _check_loaded(model)
    if isinstance(atlas, Atlas):
        atlas = atlas.hub_source or atlas.file
    request = options.Request(
        options.ShrinkOptions(
            model_name(model), to, os.fspath(out), _dtype_name(dtype), overwrite, format, quant, cut_quant, layout
        ),
        options.MeasureOptions(_named(calib), _named(atlas), sequences, seq_len, str(device)),
        options.CutsOptions(
            ",".join(_texts(methods)), ",".join(_texts(allocations)), try_recover, try_tokens, recover or BEST_RECOVERY
        ),
        options.JudgeOptions(_named(held_out), _named(other), eval_tokens),
        None if push is None else options.Publication(push, public, create_pr),
    )
    request.check()
    if push is None and (public or create_pr):
        raise UsageError("public and create_pr are for push", hint="add push=, or leave them out")
    if push:
        check_repo(push)
    if push is not None:
        check_login()
    with bars(progress):
        return run(foresee(request), shown=bars_shown())


def ablate(
    atlas: Given,
    experiment: str,
    model: GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    out: str | os.PathLike[str] | None = None,
    *,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    store: str | os.PathLike[str] | None = None,
    replace: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Ablation:
    """Measure what the removal of chosen channels costs, with controls.

    The channels are masked in one loaded model, which is afterwards as it was.

    Args:
        atlas: A complete atlas of the model.
        experiment: ``remove``, ``mean-replace``, ``halo``, ``dose``, ``channels`` or ``weights``.
        model: A model as `evaluate` takes it. None for the model that the atlas names, from the Hub.
        text: A text as `evaluate` takes it.
        out: Directory for ``results.csv`` and ``results.json``; rows that it holds are not measured again. None keeps the
            rows in memory.
        seq_len, max_tokens, device, device_map, dtype: As for `evaluate`.
        overwrite: Whether the rows that ``out`` holds are dropped.
        store: Atlas to write with the measured losses of the experiment ``channels``, and their standard errors, as columns: a
            new file, or the file of ``atlas``.
        replace: Whether losses that ``atlas`` has already are replaced.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.
        options: Options of the experiment, by the names that ``surgery ablate EXPERIMENT --help`` lists, such as
            ``select``, ``seeds`` and ``layers``. A sequence takes the place of text between commas.

    Returns:
        Rows with the loss in nats per token and its rise over the reference of the condition, and their summary.

    Raises:
        chanfmt.UsageError: An option has no meaning, or the rows in ``out`` were measured differently.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what the experiment needs.
        chanfmt.ModelError: The model cannot be loaded, or is not the model of the atlas.
        TypeError: The experiment has no such option.
        KeyboardInterrupt: Ctrl-C. Finished rows stay in ``out``.
    """
    from chanfmt.base.narrate import bars
    from chanfmt.hub.locate import opened
    from surgery.experiments.ablation.experiments import kind_of
    from surgery.experiments.ablation.run import ablate as run_experiment

    _check_names("ablate", options, kind_of(experiment).options)
    with bars(progress), opened(atlas) as given:
        return run_experiment(
            given,
            experiment,
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=str(device),
            device_map=device_map,
            dtype=str(dtype).removeprefix("torch."),
            output=out,
            overwrite=overwrite,
            store=store,
            replace=replace,
            **options,
        )


def replaceability(
    atlas: Given,
    model: GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    *,
    select: str | Sequence[str] = "supernodes+halo",
    layers: str | None = None,
    peers: int | str = "all",
    skip_first: int = 1,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    store: str | os.PathLike[str] | None = None,
    replace: bool = False,
    progress: bool | None = None,
) -> Replaceability:
    """Measure how well channels are predicted by other channels of their FFN: R^2 on held-out blocks of a text, and its null.

    Args:
        atlas: A complete atlas of the model.
        model: A model as `evaluate` takes it. None for the model that the atlas names, from the Hub.
        text: A text as `evaluate` takes it.
        select: Selectors of the channels to predict; ``top:lp=100%`` is every channel.
        layers: Layers of these channels, such as ``0-3,7``; None for all.
        peers: ``all`` other channels of the FFN, or the number of channels that correlate most with the channel.
        skip_first: Tokens at the beginning of each block that are left out.
        seq_len, max_tokens, device, device_map, dtype: As for `evaluate`.
        store: Atlas to write with the results as columns: a new file, or the file of ``atlas``.
        replace: Whether values that ``atlas`` has already are replaced.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.

    Returns:
        R^2 and its null by FFN, float64 (channel,) in each, NaN if not measured; rows with medians by FFN and label.

    Raises:
        chanfmt.UsageError: An option has no meaning, the text is too short, or ``store`` cannot be written.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what a selector needs.
        chanfmt.ModelError: The model cannot be loaded, or is not the model of the atlas.
    """
    from chanfmt.base.narrate import bars
    from chanfmt.hub.locate import opened
    from surgery.experiments.replaceability import ReplaceabilityOptions
    from surgery.experiments.replaceability import replaceability as measure

    selectors = (select,) if isinstance(select, str) else tuple(select)
    with bars(progress), opened(atlas) as given:
        return measure(
            given,
            model,
            text,
            ReplaceabilityOptions(selectors, layers, str(peers), skip_first),
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=str(device),
            device_map=device_map,
            dtype=str(dtype).removeprefix("torch."),
            store=store,
            replace=replace,
        )


def push(
    result: Result | str | os.PathLike[str],
    repo: str | None = None,
    *,
    public: bool = False,
    create_pr: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Published:
    """Publish a result on the Hub, in one commit, and read the commit back.

    If the push is interrupted, the directory stays, and the same call uploads what is missing.

    Args:
        result: From `prune` or `apply`, or its directory.
        repo: ``USER/NAME``, or ``NAME`` in the logged-in user's namespace (default: MODEL-METHOD-PERCENT).
        public: Whether everyone can see the repository.
        create_pr: Whether to open a pull request in an existing repository instead of committing to it.
        evaluation: Output of ``surgery eval --json``, whose numbers go into the card.
        verify: Whether to refuse a result whose logits were not compared. If not, its card says so.
        overwrite: Whether the content of the repository is replaced.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.

    Returns:
        The name and the URL of the repository, and the commit.

    Raises:
        chanfmt.UsageError: There is no result, it was not verified, or the repository cannot be used as asked.
        chanfmt.CheckError: The result changed since it was checked, or the Hub holds something else afterwards.
        chanfmt.ChanfmtError: The Hub refused, or could not be reached.
    """
    import os

    from chanfmt.base.narrate import bars
    from surgery.result.push import PushOptions
    from surgery.result.push import push as push_directory

    options = PushOptions(
        public=public,
        create_pr=create_pr,
        overwrite=overwrite,
        eval=None if evaluation is None else os.fspath(evaluation),
        no_verify=not verify,
    )
    with bars(progress):
        return push_directory(result, repo, options)


def _default_sparsity(sparsity: float | None, to: str | None) -> float | None:
    """``sparsity``, or half if nothing says how much to remove."""
    return 0.5 if sparsity is None and to is None else sparsity


def _not_a_plan(value: object) -> UsageError:
    return UsageError(f"{type(value).__name__} is not a plan", hint="make one with: surgery.plan(atlas, sparsity=0.5)")


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _named(value: str | os.PathLike[str] | None) -> str | None:
    """The name that ``value`` is; None for None."""
    import os

    return None if value is None else os.fspath(value)


def _recovery(
    recover: str, device: str, text: str | Sequence[str], tokens: str | int, steps: int | None, start: str
) -> RecoveryOptions:
    from surgery.recovery.options import RecoveryOptions

    return RecoveryOptions(
        recover, device, recover_text=_texts(text), recover_tokens=str(tokens), recover_steps=steps, recover_start=start
    )


def _check_loaded(model: object) -> None:
    """Raise `UsageError` if ``model`` is in memory, where a function reads files."""
    if hasattr(model, "named_parameters"):
        raise UsageError(
            f"{type(model).__name__} is in memory, and a checkpoint is cut from its files",
            hint="cut it in memory: surgery.prune_(model, surgery.plan(atlas)), or pass its directory",
        )


def _file(name: str | os.PathLike[str] | None) -> Path | None:
    """The path of an input file that a caller names."""
    import os

    from chanfmt.base.inputs import input_path

    return None if name is None else input_path(os.fspath(name))


def _dtype_name(dtype: Any) -> str | None:
    """The name of ``dtype``, which may be a torch dtype; None for None."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _check_names(function: str, given: dict[str, Any], options: type) -> None:
    """Raise `TypeError`, as Python does, if ``given`` has a name that is not a field of the dataclass ``options``."""
    import dataclasses

    known = {field.name for field in dataclasses.fields(options)}
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
