"""Ask the paper's questions of real models, and write what they answer into docs/evidence.md.

    python bench/evidence.py NAME[:WEIGHTS]=MODEL [...] -o STATE --text NAME SOURCE [--text ...] --evaluate NAME SOURCE
                             [--atlas MODEL TEXT FILE] [--expect MODEL DIR] [--only NAME] [--list] [--render]

MODEL is a Hub id, a directory or a .gguf file. NAME and WEIGHTS (such as Q4_1) are what the page calls the model and its weights.
The first --text is the main text: the statistics, the cuts and the ablations use its atlas. The other texts show how much depends on
the text. --evaluate is the text that cuts and ablations are judged on.

Every measurement of `measurements` stores its raw result as JSON in STATE/NAME, and a result that is there is not measured again,
unless the atlas that it was measured with has changed. The script may be killed at any time: run the same command to continue. The
page, and the answers in docs/paper.md, are made from whatever STATE holds, so they can be written before everything is measured.
--render writes them only.

No path gets into these files: models and texts have the names that the command line gives them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __package__ in (None, ""):
    # The page has a module of its own, which is found from the root of the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.evidence_figures import figures
from bench.evidence_page import DEPENDENT, FORMAT, IMAGES, Measured, read_state, rendered
from bench.evidence_paper import filled
from bench.expect import split
from chanfmt.algebra.compare import compare
from chanfmt.algebra.labels import supernode_count, top_indices
from chanfmt.analysis.mass import concentration
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file, stem_beside
from chanfmt.base.version import __version__
from chanfmt.format.reader import Atlas
from chanfmt.reporting.make import make_report
from surgery.evaluation.perplexity import paired_bootstrap
from surgery.planning.measured import measured_cuts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from surgery.experiments.subject import Subject

ROOT = Path(__file__).resolve().parents[1]
PAGE, PAPER = ROOT / "docs" / "evidence.md", ROOT / "docs" / "paper.md"
PASSES = {"build": 3.0, "forward": 1.0}
"""Cost of a token in forward passes. A build also goes backward along the activations, and adds up products."""
TABLES = ("concentration", "factors", "spearman", "overlap", "halo", "stability", "stability-by-tokens", "reading")
"""Tables of a report that a result keeps."""
METHODS = "scar-lp,wanda,activation,magnitude"
"""Scores under which supernodes are protected or not."""
TOKENS: dict[str, int] = {"channels": 2048, "protection": 8192, "removal": 4096, "mean": 4096}
"""Tokens of the evaluation text for each kind of experiment, unless --tokens says something else."""


@dataclass(frozen=True)
class Model:
    """A model to measure: its name and its weights on the page, and its Hub id, directory or file."""

    name: str
    weights: str
    source: str

    @property
    def shown(self) -> str:
        """What commands on the page call it: the name of the file, or the Hub id."""
        return shown(self.source)


@dataclass(frozen=True)
class Settings:
    """What is measured, and where the results are.

    Attributes:
        texts: Name of a text to its source; the first is the main text.
        evaluate: Name and source of the text that cuts and ablations are judged on.
        atlases: Model's name and text's name to a file that was built before.
        expect: Model's name to the directory of the rows of bench/expect.py.
        sequences, others: Sequences of the main text, and of every other text.
        seq_len: Tokens in a sequence and in a block.
        tokens: Tokens of the evaluation text for each kind of experiment.
        channels: Single channels to remove from each of three FFNs.
    """

    state: Path
    texts: dict[str, str]
    evaluate: tuple[str, str]
    atlases: dict[tuple[str, str], Path] = field(default_factory=dict)
    expect: dict[str, Path] = field(default_factory=dict)
    expect_texts: tuple[str, ...] = ()
    sequences: int = 64
    others: int = 16
    seq_len: int = 512
    tokens: dict[str, int] = field(default_factory=lambda: TOKENS.copy())
    channels: int = 21
    seed: int = 0
    stream: bool = False
    dtype: str = "auto"

    @property
    def main(self) -> str:
        return next(iter(self.texts))

    def directory(self, model: Model) -> Path:
        return self.state / model.name

    def atlas(self, model: Model, text: str) -> Path:
        """The file of an atlas, which need not be there yet."""
        return self.atlases.get((model.name, text)) or self.directory(model) / f"{text}.h5"


@dataclass(frozen=True)
class Measurement:
    """One measurement of one model.

    Attributes:
        name: Name of its result: the kind, and for some kinds a text, as in ``atlas/code``.
        command: What a user would type for it, with names in place of paths; empty if the page only reads atlases.
        tokens: Tokens that the model reads, over all runs.
        passes: Cost of a token in forward passes.
        atlases: Names of the texts whose atlases it reads.
    """

    name: str
    command: str
    tokens: int = 0
    passes: float = 0.0
    atlases: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def text(self) -> str:
        return self.name.partition("/")[2]

    @property
    def work(self) -> float:
        """Cost in tokens of a forward pass."""
        return self.tokens * self.passes


def measurements(model: Model, settings: Settings) -> tuple[Measurement, ...]:
    """All measurements of ``model``, in the order in which they are made: what many questions need comes first."""
    main, found = settings.main, []
    for text, source in settings.texts.items():
        sequences = settings.sequences if text == main else settings.others
        words = ["atlas", "build", model.shown, "--calib", shown(source), "--sequences", str(sequences)]
        words += ["--seq-len", str(settings.seq_len), "--seed", str(settings.seed), *(["--stream"] if settings.stream else [])]
        given = (model.name, text) in settings.atlases
        found.append(
            Measurement(
                f"atlas/{text}",
                shlex.join([*words, "-o", f"{text}.h5"]),
                0 if given else sequences * settings.seq_len,
                0.0 if given else PASSES["build"],
            )
        )
        if text == main:
            found.append(
                Measurement(f"statistics/{text}", f"atlas report {shlex.quote(text + '.h5')} -o report", atlases=(text,))
            )
    found += [
        Measurement(f"statistics/{text}", f"atlas report {shlex.quote(text + '.h5')} -o report", atlases=(text,))
        for text in settings.texts
        if text != main
    ]
    if len(settings.texts) > 1:
        files = [f"{text}.h5" for text in settings.texts]
        found.append(Measurement("texts", shlex.join(["atlas", "compare", *files]), atlases=tuple(settings.texts)))
    runs = {"protection": 2 * len(METHODS.split(",")), "channels": 1 + 3 * settings.channels, "removal": 7, "mean": 3}
    commands = {
        "protection": [
            *("sweep", f"{main}.h5", "--methods", METHODS, "--protections", "none", "--protections", "supernodes"),
            *("--sparsity", "0.5"),
        ],
        "removal": [
            "ablate",
            "remove",
            f"{main}.h5",
            "--select",
            "supernodes",
            "--select",
            "halo",
            "--control",
            "random,lp-matched",
        ],
        "channels": ["ablate", "channels", f"{main}.h5", "--channels", str(settings.channels)],
        "mean": ["ablate", "mean-replace", f"{main}.h5", "--select", "supernodes", "--control", "random"],
    }
    for kind, words in commands.items():
        tokens = settings.tokens[kind]
        data = ["--data", shown(settings.evaluate[1]), "--seq-len", str(settings.seq_len), "--max-tokens", str(tokens)]
        command = shlex.join(["surgery", *words, "--model", model.shown, *data, "-o", kind])
        found.append(Measurement(kind, command, tokens * runs[kind], PASSES["forward"], (main,)))
    found.append(Measurement("cuts", "python bench/expect.py"))
    return tuple(found)


def shown(source: str) -> str:
    """``source`` as the page names it: a file or a directory without its path."""
    return Path(source).name if os.path.exists(source) else source


# Measure.


class Session:
    """One model while it is measured. It is loaded when the first measurement needs it."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def open(self, text: str) -> Atlas:
        return Atlas.open(self.settings.atlas(self.model, text))

    def rows_of(self, atlas: Atlas, measurement: Measurement) -> Path:
        """Directory of the rows of an experiment, which another atlas or another text begins anew."""
        tokens = self.settings.tokens[measurement.kind]
        return self.settings.directory(self.model) / f"{measurement.kind}-{atlas.content_sha256[:8]}-{tokens}"

    @functools.cached_property
    def _loaded(self) -> Subject:
        from surgery.evaluation.protocol import before_text
        from surgery.experiments.subject import open_subject

        settings = self.settings
        with self.open(settings.main) as atlas:
            subject = open_subject(
                atlas,
                self.model.source,
                settings.evaluate[1],
                seq_len=settings.seq_len,
                max_tokens=max(settings.tokens.values()),
                dtype=settings.dtype,
            )
        assert subject.source is not None
        before = before_text(subject.source, settings.seq_len)
        ids = subject.token_ids.copy()
        for place, token in enumerate(before):
            # The first token of a block is not predicted. `surgery eval` puts BOS in its place, too.
            ids[place :: settings.seq_len] = token
        if before:
            log(f"{self.model.name}: the tokenizer's BOS takes the place of the first token of every block")
        identity = subject.identity | {"data": settings.evaluate[0], "before": [int(token) for token in before]}
        return dataclasses.replace(subject, token_ids=ids, identity=identity)

    def subject(self, tokens: int) -> Subject:
        """The model with the first ``tokens`` tokens of the evaluation text, and with BOS in front of each block if it has one."""
        ids = self._loaded.token_ids[:tokens]
        digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
        identity = self._loaded.identity | {"tokens": len(ids), "tokens_sha256": digest}
        return dataclasses.replace(self._loaded, token_ids=ids, identity=identity)


def inputs_of(measurement: Measurement, session: Session) -> list[str]:
    """Digests of the atlases that ``measurement`` reads or makes, of those that are there."""
    found = []
    for text in (measurement.text,) if measurement.kind == "atlas" else measurement.atlases:
        if session.settings.atlas(session.model, text).exists():
            with session.open(text) as atlas:
                found.append(atlas.content_sha256)
    return found


def measure_atlas(session: Session, measurement: Measurement) -> dict[str, Any]:
    """Build the atlas of one text, unless its file is there, and say what it is."""
    import chanfmt

    settings, text = session.settings, measurement.text
    path = settings.atlas(session.model, text)
    if not path.exists():
        if (session.model.name, text) in settings.atlases:
            raise UsageError(f"{path.name} is not there yet", hint="run the script again when it is")
        chanfmt.build(
            session.model.source,
            path,
            settings.texts[text],
            sequences=settings.sequences if text == settings.main else settings.others,
            seq_len=settings.seq_len,
            seed=settings.seed,
            stream=settings.stream,
            resume=path.with_name(stem_beside(path.name) + ".partial").exists(),
            dtype=settings.dtype,
        ).close()
    with Atlas.open(path) as atlas:
        record = atlas.calibration
        return {
            "sequences": record.sequences,
            "seq_len": record.seq_len,
            "tokens": record.tokens,
            "seed": record.seed,
            "ends": record.ends_note,
            "seconds": atlas.producer.seconds,
            "content_sha256": atlas.content_sha256,
            "model_type": atlas.model.model_type,
            "parameters": atlas.model.parameters,
            "fingerprint": atlas.model.fingerprint,
            "widths": [block.n_channels for block in atlas.blocks],
        }


def measure_statistics(session: Session, measurement: Measurement) -> dict[str, Any]:
    """The tables and claims of the report of one atlas."""
    with session.open(measurement.text) as atlas:
        report = make_report(atlas)
        sizes = shares_by_tokens(atlas)
        tables = {table.name: table for section in report.sections for table in section.tables}
        return {
            "tables": {
                name: {column: np.asarray(values).tolist() for column, values in tables[name].columns.items()}
                for name in TABLES
                if name in tables
            },
            "claims": [vars(claim) for section in report.sections for claim in section.claims],
            "shares_by_tokens": sizes,
        }


def shares_by_tokens(atlas: Atlas) -> list[dict[str, Any]]:
    """Share of LP in the top 1% as parts of the text would give it, FFN by FFN: the mean over the parts of each size."""
    found: dict[int, list[float]] = {}
    for unit in atlas.units():
        if not (unit.holds("sum_q2_split") and unit.holds("tokens_split")):
            continue
        sums, counts = unit.by_split("sum_q2_split").astype(np.float64), unit.by_split("tokens_split")
        part = 1
        while part <= len(sums):
            parts = [sums[start : start + part].sum(axis=0) for start in range(0, len(sums) - part + 1, part)]
            share = float(np.mean([concentration(values).top_share for values in parts]))
            found.setdefault(int(counts[:part].sum()), []).append(share)
            part *= 2
    return [{"tokens": tokens, "top_share": shares} for tokens, shares in found.items()]


def measure_texts(session: Session, measurement: Measurement) -> dict[str, Any]:
    """Overlap of the supernodes of pairs of texts, FFN by FFN, beside that of samples of the main text of the same size."""
    texts = [text for text in measurement.atlases if session.settings.atlas(session.model, text).exists()]
    atlases = {text: session.open(text) for text in texts}
    try:
        if session.settings.main not in texts or len(texts) < 2:
            raise UsageError("the main text and another text need an atlas", hint="measure atlas/* first")
        main, *others = texts
        rho = atlases[main].labels.rho
        size = min(atlases[text].calibration.tokens for text in others)
        parts = [main_parts(unit, size) for unit in atlases[main].units()]
        tops = {
            text: [top_of(unit.by_split("sum_q2_split").sum(axis=0), rho) for unit in atlases[text].units()] for text in others
        }
        samples = [[top_of(sums, rho) for sums in unit] for unit, _ in parts]
        same = [float(np.mean([jaccard(*pair) for pair in itertools.combinations(unit, 2)])) for unit in samples]
        pairs = [
            {
                "first": main,
                "second": text,
                "jaccard": [mean_jaccard(unit, top) for unit, top in zip(samples, tops[text], strict=True)],
            }
            for text in others
        ]
        pairs += [
            {"first": one, "second": two, "jaccard": [jaccard(a, b) for a, b in zip(tops[one], tops[two], strict=True)]}
            for one, two in itertools.combinations(others, 2)
        ]
        whole = []
        for one, two in itertools.combinations(texts, 2):
            by_lp, by_power = (compare(atlases[one], atlases[two], metric) for metric in ("lp", "activation_power"))
            whole.append(
                {
                    "first": one,
                    "second": two,
                    "lp": [row.top_jaccard for row in by_lp],
                    "activation_power": [row.top_jaccard for row in by_power],
                    "captured": [row.captured for row in by_lp],
                    "spearman": [row.correlation for row in by_lp],
                    "chance": [row.top_chance for row in by_lp],
                }
            )
        return {
            "texts": texts,
            "tokens": {text: atlases[text].calibration.tokens for text in texts},
            "sample_tokens": {"main": parts[0][1], "others": size},
            "same": {"text": main, "jaccard": same},
            "pairs": pairs,
            "whole": whole,
        }
    finally:
        for atlas in atlases.values():
            atlas.close()


def main_parts(unit: Any, tokens: int) -> tuple[list[np.ndarray], int]:
    """Sums of q^2 of disjoint parts of the text of about ``tokens`` tokens each, made of whole splits, and the tokens of a part."""
    sums, counts = unit.by_split("sum_q2_split").astype(np.float64), unit.by_split("tokens_split")
    group = max(1, round(tokens / float(counts.mean())))
    parts = [sums[start : start + group].sum(axis=0) for start in range(0, len(sums) - group + 1, group)]
    if len(parts) < 2:
        raise UsageError("the atlas of the main text is too small for two samples of the size of the others")
    return parts, int(counts[:group].sum())


def top_of(sums: np.ndarray, rho: float) -> np.ndarray:
    return top_indices(sums, supernode_count(len(sums), rho))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def mean_jaccard(samples: Sequence[np.ndarray], top: np.ndarray) -> float:
    return float(np.mean([jaccard(sample, top) for sample in samples]))


def measure_protection(session: Session, measurement: Measurement) -> dict[str, Any]:
    """Cuts at one sparsity by several scores, with and without the supernodes protected."""
    from surgery.experiments.sweep import sweep

    with session.open(session.settings.main) as atlas:
        found = sweep(
            atlas,
            session.subject(session.settings.tokens["protection"]),
            methods=METHODS,
            sparsity="0.5",
            protect=("none", "supernodes"),
            output=session.rows_of(atlas, measurement),
        )
        return {"identity": found.identity, "rows": found.rows}


def ablation(experiment: str, **options: Any) -> Callable[[Session, Measurement], dict[str, Any]]:
    """The action of a measurement that removes channels."""

    def measure(session: Session, measurement: Measurement) -> dict[str, Any]:
        from surgery.experiments.ablation.run import ablate

        settings = session.settings
        chosen = options | ({"channels": settings.channels} if experiment == "channels" else {})
        with session.open(settings.main) as atlas:
            found = ablate(
                atlas,
                experiment,
                session.subject(settings.tokens[measurement.kind]),
                output=session.rows_of(atlas, measurement),
                **chosen,
            )
            return {"identity": found.results.identity, "rows": found.rows, "summary": found.summary}

    return measure


def measure_cuts(session: Session, measurement: Measurement) -> dict[str, Any]:
    """The cuts that bench/expect.py has measured so far: the rows of its directory, or else those of the package."""
    name, settings = session.model.name, session.settings
    directory = settings.expect.get(name)
    if directory is not None and (directory / "results.json").exists():
        return rows_of_expect(json.loads((directory / "results.json").read_text(encoding="utf-8")), settings.expect_texts)
    known = [cut for cut in measured_cuts() if cut.model == name]
    if not known:
        raise UsageError(f"bench/expect.py has no rows for {name} yet", hint="run the script again when it has")
    return {
        "texts": [loss.text for loss in known[0].losses],
        "cuts": [
            {
                "method": cut.method,
                "recover": cut.recovery,
                "share": cut.channels_removed,
                "above": [[loss.above, loss.low, loss.high] for loss in cut.losses],
                "blocks": [loss.blocks for loss in cut.losses],
            }
            for cut in known
            if cut.allocation == "uniform"
        ],
    }


def rows_of_expect(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The cuts in the results file of bench/expect.py, each with its loss above the dense model's on every text."""
    identity, rows = content["identity"], content["rows"]
    lengths = [text["tokens"] for text in identity["texts"]]
    dense = split(next(row for row in rows if row["method"] == "dense"), lengths, identity["seq_len"])
    cuts = []
    for row in rows:
        if row["method"] == "dense":
            continue
        found = [paired_bootstrap(one, other) for one, other in zip(dense, split(row, lengths, identity["seq_len"]), strict=True)]
        cuts.append(
            {
                "method": row["method"],
                "recover": row["recover"],
                "share": row["sparsity_reached"],
                "above": [[item.difference, item.low, item.high] for item in found],
                "blocks": [item.blocks for item in found],
            }
        )
    return {"texts": list(names) or [f"text {number + 1}" for number in range(len(lengths))], "cuts": cuts}


ACTIONS: dict[str, Callable[[Session, Measurement], dict[str, Any]]] = {
    "atlas": measure_atlas,
    "statistics": measure_statistics,
    "texts": measure_texts,
    "protection": measure_protection,
    "removal": ablation("remove", select=("supernodes", "halo"), control="random,lp-matched"),
    "channels": ablation("channels"),
    "mean": ablation("mean-replace", select=("supernodes",), control="random"),
    "cuts": measure_cuts,
}
"""Kind of a measurement to the function that makes it."""


# State.


def result_path(model: Model, settings: Settings, measurement: Measurement) -> Path:
    return settings.directory(model) / f"{measurement.name.replace('/', '-')}.json"


def is_done(session: Session, measurement: Measurement) -> bool:
    """Whether the result is there, and was measured with the atlases that are there now."""
    path = result_path(session.model, session.settings, measurement)
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    # Rows of bench/expect.py are added while it runs, and reading them again costs nothing.
    return measurement.kind != "cuts" and bool(stored["inputs"] == inputs_of(measurement, session))


def take(session: Session, measurement: Measurement) -> None:
    """Make one measurement, and store its result."""
    model, settings = session.model, session.settings
    started, cpu = time.monotonic(), time.process_time()
    result = ACTIONS[measurement.kind](session, measurement)
    content = {
        "format": FORMAT,
        "name": measurement.name,
        "command": measurement.command,
        "tokens": measurement.tokens,
        "work": measurement.work,
        "seed": settings.seed,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "version": __version__,
        "machine": machine(),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "inputs": inputs_of(measurement, session),
        "result": without_nan(result),
    }
    store(result_path(model, settings, measurement), content)


def store(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """``value`` with None in place of numbers that are not finite, because JSON has none of these."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def machine() -> str:
    """The processor and the threads in words."""
    import torch

    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}" + (", a GPU" if torch.cuda.is_available() else "")


# The command line.


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "models", nargs="*", metavar="NAME[:WEIGHTS]=MODEL", help="model to measure; NAME is its name on the page"
    )
    result.add_argument("-o", "--state", type=Path, help="directory of the results; the page is made from all models in it")
    result.add_argument(
        "--text",
        action="append",
        nargs=2,
        default=[],
        metavar=("NAME", "SOURCE"),
        help="text as --calib takes it; the first is the main text",
    )
    result.add_argument(
        "--about", action="append", nargs=2, default=[], metavar=("TEXT", "WORDS"), help="what a text is, for the page"
    )
    result.add_argument("--evaluate", nargs=2, metavar=("NAME", "SOURCE"), help="text that cuts and ablations are judged on")
    result.add_argument(
        "--atlas", action="append", nargs=3, default=[], metavar=("MODEL", "TEXT", "FILE"), help="atlas that was built before"
    )
    result.add_argument(
        "--expect", action="append", nargs=2, default=[], metavar=("MODEL", "DIR"), help="directory of bench/expect.py's rows"
    )
    result.add_argument("--expect-texts", default="", help="names of the texts of these rows, separated by semicolons")
    result.add_argument("--sequences", type=int, default=64, help="sequences of the main text (default: %(default)s)")
    result.add_argument("--other-sequences", type=int, default=16, help="sequences of each other text (default: %(default)s)")
    result.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence and in a block (default: %(default)s)")
    result.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="KIND=N",
        help="tokens to evaluate in experiments of one kind (default: " + ", ".join(f"{k}={v}" for k, v in TOKENS.items()) + ")",
    )
    result.add_argument("--channels", type=int, default=21, help="channels to remove, one at a time, from each of 3 FFNs")
    result.add_argument("--seed", type=int, default=0, help="seed of the calibration samples")
    result.add_argument("--stream", action="store_true", help="build atlases one block at a time, for models larger than memory")
    result.add_argument("--dtype", default="auto", help="dtype of the model (default: %(default)s)")
    result.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="measure these only, such as atlas/code or 'atlas/*'"
    )
    result.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave these out; the page says that they are missing"
    )
    result.add_argument("--list", action="store_true", help="list the measurements with their costs, and stop")
    result.add_argument("--render", action="store_true", help="write the page from the results, and stop")
    result.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    result.add_argument("--paper", type=Path, default=PAPER, help=argparse.SUPPRESS)
    return result


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if not arguments.state:
            raise UsageError("-o is missing", hint="name the directory of the results")
        if not arguments.render:
            settings = settings_of(arguments)
            models = [model_of(word) for word in arguments.models]
            if not models:
                raise UsageError("no model is named", hint="write NAME=MODEL, or --render for the page only")
            for model in models:
                run(model, settings, arguments)
            if arguments.list:
                return 0
        write_pages(arguments.page, arguments.paper, read_state(arguments.state))
    except ChanfmtError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    return 0


def write_pages(page: Path, paper: Path, state: Sequence[Measured]) -> None:
    """Write the page with its figures, and the answers in the page of the paper if there is one."""
    drawn = figures(state)
    contents = {page.parent / IMAGES / name: content for name, content in drawn.items()}
    contents[page] = rendered(state, drawn).encode()
    if paper.exists():
        contents[paper] = filled(paper.read_text(encoding="utf-8"), state).encode()
    (page.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_bytes(content)


def model_of(word: str) -> Model:
    name, separator, source = word.partition("=")
    if not (separator and name and source):
        raise UsageError(f"{word} is not NAME=MODEL", hint="for example SmolLM2-135M:Q4_1=model.gguf")
    name, _, weights = name.partition(":")
    return Model(name, weights, source)


def settings_of(arguments: argparse.Namespace) -> Settings:
    for name in ("text", "evaluate"):
        if not getattr(arguments, name):
            raise UsageError(f"--{name} is missing", hint="see --help")
    tokens = dict(TOKENS)
    for word in arguments.tokens:
        kind, _, count = word.partition("=")
        if kind not in TOKENS or not count.isdecimal():
            raise UsageError(f"--tokens {word} is not KIND=N", hint=f"the kinds are {', '.join(TOKENS)}")
        tokens[kind] = int(count)
    return Settings(
        state=arguments.state,
        texts=dict(arguments.text),
        evaluate=tuple(arguments.evaluate),
        atlases={(model, text): Path(path) for model, text, path in arguments.atlas},
        expect={model: Path(path) for model, path in arguments.expect},
        expect_texts=tuple(filter(None, arguments.expect_texts.split(";"))),
        sequences=arguments.sequences,
        others=arguments.other_sequences,
        seq_len=arguments.seq_len,
        tokens=tokens,
        channels=arguments.channels,
        seed=arguments.seed,
        stream=arguments.stream,
        dtype=arguments.dtype,
    )


def run(model: Model, settings: Settings, arguments: argparse.Namespace) -> None:
    """Make every measurement of ``model`` that is asked for and missing, or list them."""
    session, directory = Session(model, settings), settings.directory(model)
    directory.mkdir(parents=True, exist_ok=True)
    chosen = [
        item
        for item in measurements(model, settings)
        if (not arguments.only or any(fnmatch.fnmatch(item.name, pattern) for pattern in arguments.only))
        and not any(fnmatch.fnmatch(item.name, pattern) for pattern in arguments.skip)
    ]
    if arguments.list:
        print("\n".join(listed(session, chosen)))
        return
    about = {"name": model.name, "weights": model.weights, "source": model.shown}
    texts = {"texts": {name: shown(source) for name, source in settings.texts.items()}}
    names = {"evaluate": settings.evaluate[0], "evaluate_source": shown(settings.evaluate[1])}
    store(
        directory / "model.json",
        {"format": FORMAT, **about, **texts, **names, "described": dict(arguments.about), "command": command_of(model, settings)},
    )
    for item in chosen:
        missing = [text for text in item.atlases if not settings.atlas(model, text).exists()]
        if missing and item.name not in DEPENDENT:
            log(f"{model.name} {item.name}: waits for the atlas of {', '.join(missing)}")
            continue
        if is_done(session, item):
            continue
        log(f"{model.name} {item.name}: {item.tokens:,} tokens")
        try:
            take(session, item)
        except UsageError as error:
            # One measurement that cannot be made yet, such as one of an atlas that another process builds, stops no other.
            log(f"{model.name} {item.name}: {error.message}")
        else:
            log(f"{model.name} {item.name}: done")


def command_of(model: Model, settings: Settings) -> str:
    """The command line that measures ``model``, with the names of files in place of paths."""
    weights = f":{model.weights}" if model.weights else ""
    words = ["python", "bench/evidence.py", f"{model.name}{weights}={model.shown}", "-o", settings.state.name]
    for name, source in settings.texts.items():
        words += ["--text", name, shown(source)]
    words += ["--evaluate", settings.evaluate[0], shown(settings.evaluate[1])]
    for (owner, text), path in settings.atlases.items():
        words += ["--atlas", owner, text, path.name] if owner == model.name else []
    words += [
        "--sequences",
        str(settings.sequences),
        "--other-sequences",
        str(settings.others),
        "--seq-len",
        str(settings.seq_len),
    ]
    words += [word for kind, count in settings.tokens.items() for word in ("--tokens", f"{kind}={count}")]
    words += ["--channels", str(settings.channels), *(["--stream"] if settings.stream else [])]
    return shlex.join(words)


def listed(session: Session, chosen: Sequence[Measurement]) -> list[str]:
    """One line for each measurement: its name, its tokens, and its seconds, measured or estimated from the others of the model."""
    seconds, work = {}, 0.0
    for item in chosen:
        path = result_path(session.model, session.settings, item)
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            seconds[item.name] = stored["seconds"]
            work += stored["work"]
    rate = sum(seconds[item.name] for item in chosen if item.name in seconds and item.work) / work if work else None
    lines = [f"{session.model.name}"]
    for item in chosen:
        if item.name in seconds:
            cost = f"{seconds[item.name]:.0f} s, measured"
        elif not item.work:
            cost = "seconds"
        else:
            cost = "unknown until the first is measured" if rate is None else f"about {rate * item.work:.0f} s"
        lines.append(f"  {item.name:22} {item.tokens:>9,} tokens x {item.passes:g}  {cost:36} {item.command}")
    return lines


def log(text: str) -> None:
    print(f"{datetime.datetime.now(datetime.UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
