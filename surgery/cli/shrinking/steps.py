"""The steps of `surgery shrink` as data: each is a command line of its own."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.planning.formats import GGUF, SAFETENSORS
from surgery.planning.grids import parse_names
from surgery.planning.layouts import AUTO, DECI, UNIFORM

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.cli.shrinking.options import Publication, Request
    from surgery.cli.shrinking.texts import Texts

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the larger of two numbers.",
)
"""Prompts that both models answer."""
WORK = ".work"
"""Suffix of the directory with the steps' results, after the name of the output."""
HEALING_TOKENS = "1M"
"""Tokens that the healing command draws at most."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Name of the step.
        what: What the step does, as the rest of a sentence.
        words: The command line.
        output: What exists when the step is done.
        whole: Whether ``output`` appears only when it is complete.
        stdout: File for what the command prints; None if nobody needs it.
    """

    name: str
    what: str
    words: tuple[str, ...]
    output: Path
    whole: bool = True
    stdout: Path | None = None

    @property
    def command(self) -> str:
        """The command line as a shell takes it."""
        return shlex.join(self.words) + (f" > {shlex.quote(str(self.stdout))}" if self.stdout else "")


@dataclass(frozen=True)
class Places:
    """Where things are: the output, and the directory for the steps' results beside it."""

    output: Path

    def model(self, format: str) -> Path:
        """What a program loads: the output, or the GGUF file in it."""
        return self.output / f"{self.output.absolute().name}.gguf" if format == GGUF else self.output

    @property
    def work(self) -> Path:
        return self.output.with_name(self.output.name + WORK)

    @property
    def atlas(self) -> Path:
        return self.work / "atlas.h5"

    @property
    def held_out(self) -> Path:
        return self.work / "evaluation.json"

    @property
    def other(self) -> Path:
        return self.work / "evaluation-other.json"

    def tried(self, allocation: str) -> Path:
        """Directory of the rows of the cuts that were tried with ``allocation``."""
        return self.work / f"try-{allocation}"


def measure_step(request: Request, texts: Texts, places: Places) -> Step | None:
    """Build the atlas; None if one is given."""
    if request.measure.atlas:
        return None
    words = (
        *("atlas", "build", request.shrink.model, "-o", str(places.atlas), "--calib", texts.calib),
        *("--sequences", str(request.measure.sequences), "--seq-len", str(request.measure.seq_len)),
        *_device(request),
        # Without an unfinished atlas, it starts from the beginning.
        "--resume",
    )
    return Step("measure", "measure which channels matter", words, places.atlas)


def atlas_of(request: Request, places: Places) -> str:
    """Name of the atlas that the steps use."""
    return request.measure.atlas or str(places.atlas)


def try_steps(request: Request, texts: Texts, places: Places, to: str, recover: str) -> list[Step]:
    """Measure the candidates in place, one command per allocation; none if there is nothing to choose from."""
    methods, allocations = parse_names(request.cuts.methods), parse_names(request.cuts.allocations)
    if len(methods) * len(allocations) == 1:
        return []
    return [
        Step(
            f"try {allocation}",
            f"try {', '.join(methods)} with {allocation} allocation",
            (
                *("surgery", "sweep", atlas_of(request, places), "--model", request.shrink.model),
                *("-o", str(places.tried(allocation)), "--methods", ",".join(methods), "--to", to),
                *_allocation(allocation),
                *_layout(request),
                *(() if recover == "none" else ("--recover", recover)),
                *("--data", texts.held_out, "--seq-len", str(request.measure.seq_len)),
                *("--max-tokens", str(request.cuts.try_tokens)),
                *_device(request),
            ),
            places.tried(allocation) / "results.json",
            # The rows appear one after the other.
            whole=False,
        )
        for allocation in allocations
    ]


def cut_step(request: Request, places: Places, method: str, allocation: str, recover: str) -> Step:
    """Cut the model, recover it and check it."""
    words = (
        *("surgery", "prune", atlas_of(request, places), "--model", request.shrink.model, "--to", request.shrink.to),
        *("--method", method, *_allocation(allocation), *_layout(request)),
        *(() if recover == "none" else ("--recover", recover)),
        *(() if recover == "none" or request.measure.device == "auto" else ("--recover-device", request.measure.device)),
        *_written(request),
        *("-o", str(places.output)),
        *(("--overwrite",) if request.shrink.overwrite else ()),
    )
    return Step("cut", f"cut by {method}, recover by {recover}", words, places.output, whole=not request.shrink.overwrite)


def evaluate_steps(request: Request, texts: Texts, places: Places) -> list[Step]:
    """Measure both models on the held-out text, with their answers, and on a text of another kind."""
    both = ("surgery", "eval", request.shrink.model, str(places.model(request.format)))
    how = (
        *("--seq-len", str(request.measure.seq_len), "--max-tokens", str(request.judge.eval_tokens)),
        *_device(request),
        "--json",
    )
    prompts = tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))
    steps = [
        Step(
            "evaluate",
            "compare both models on the held-out text, and let them answer",
            (*both, "--data", texts.held_out, *prompts, *how),
            places.held_out,
            stdout=places.held_out,
        )
    ]
    if texts.other is not None:
        words = (*both, "--data", texts.other, *how)
        steps.append(Step("evaluate other", "compare both models on another text", words, places.other, stdout=places.other))
    return steps


def push_step(places: Places, publication: Publication) -> Step:
    """Publish the result."""
    words = (
        *("surgery", "push", str(places.output), *((publication.repo,) if publication.repo else ())),
        *(("--public",) if publication.public else ()),
        *(("--pr",) if publication.create_pr else ()),
    )
    return Step("push", "publish the result", words, places.output, whole=False)


def healing_text(request: Request, texts: Texts) -> str:
    """Text that the result is healed on; empty for the tokens in the atlas, if only the held-out text has a name."""
    return texts.calib or ("" if request.judge.held_out else texts.held_out)


def next_commands(request: Request, texts: Texts, places: Places, heal: str | None, layout: str = UNIFORM) -> dict[str, str]:
    """What a person may want to do next, by name. Each command of chanfmt runs as it stands, without this project's files.

    Args:
        heal: Recovery that heals the result, from the dense model; None for none.
        layout: Layout of the result. llama.cpp's converter reads few results with a width for each layer.
    """
    output, model, text = str(places.output), str(places.model(request.format)), healing_text(request, texts)
    healing: tuple[str, ...] = (
        *("surgery", "apply", f"{output}/kept_channels.safetensors", "--model", request.shrink.model),
        *("--atlas", atlas_of(request, places), "--recover", str(heal)),
        *(("--recover-text", text, "--recover-tokens", HEALING_TOKENS) if text else ()),
        *(() if request.measure.device == "auto" else ("--recover-device", request.measure.device)),
        *_written(request),
        *("-o", f"{output}-healed"),
    )
    following = {} if heal is None else {"heal": healing}
    if request.format == GGUF:
        following["serve"] = ("llama-server", "-m", model)
    elif layout == DECI:
        following["serve"] = ("vllm", "serve", output, "--trust-remote-code")
    elif layout == UNIFORM:
        following["quantise"] = ("python", "convert_hf_to_gguf.py", output, "--outtype", "q8_0", "--outfile", f"{output}.gguf")
        following["serve"] = ("vllm", "serve", output)
    following["push"] = ("surgery", "push", output)
    return {name: shlex.join(words) for name, words in following.items()}


def _allocation(allocation: str) -> tuple[str, ...]:
    return () if allocation == "uniform" else ("--allocation", allocation)


def _layout(request: Request) -> tuple[str, ...]:
    return () if request.shrink.layout == AUTO else ("--layout", request.shrink.layout)


def _written(request: Request) -> tuple[str, ...]:
    """How the result is written, as options of ``surgery prune`` and ``surgery apply``."""
    shrink = request.shrink
    return (
        *(() if request.format == SAFETENSORS else ("--format", request.format)),
        *(() if shrink.quant is None else ("--quant", shrink.quant)),
        *(() if shrink.cut_quant is None else ("--cut-quant", shrink.cut_quant)),
        *(() if request.dtype is None else ("--dtype", request.dtype)),
    )


def _device(request: Request) -> tuple[str, ...]:
    return () if request.measure.device == "auto" else ("--device", request.measure.device)
