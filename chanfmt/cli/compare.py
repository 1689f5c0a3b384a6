"""`atlas compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import progress_bar, say
from chanfmt.base.text import significant, span
from chanfmt.cli import framework
from chanfmt.cli.options import SeveralAtlasesOptions
from chanfmt.format import schema

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from chanfmt.algebra.compare import FFNComparison
    from chanfmt.format.reader import Atlas


EXAMPLES = (
    "atlas compare wikitext.h5 code.h5",
    "atlas compare base.h5 tuned.h5 --metric activation_power",
    "atlas compare a.h5 b.h5 c.h5 --json",
)


@dataclass(frozen=True)
class ComparedOptions:
    """What is compared."""

    metric: str = field(
        default="lp",
        metadata={
            "help": f"metric whose ranks and mass are compared: {', '.join(schema.METRIC_BY_NAME)}, or a metric of another program "
            "that the atlases hold, as x_OWNER/NAME",
            "metavar": "METRIC",
        },
    )


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "compare",
        "compare how atlases rank and label channels",
        run=_run,
        options=lambda: (SeveralAtlasesOptions, ComparedOptions),
        examples=EXAMPLES,
        description=(
            "Compare two atlases of one architecture FFN by FFN, or each pair of several atlases. They may differ in text, "
            "checkpoint or settings."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    import contextlib

    from chanfmt.base.errors import UsageError
    from chanfmt.hub.locate import open_atlas

    if len(arguments.files) < 2:
        raise UsageError(
            "a comparison needs two atlases or more", hint=f"name another atlas: atlas compare {arguments.files[0]} FILE"
        )
    with contextlib.ExitStack() as stack:
        atlases = [stack.enter_context(open_atlas(file, contained=True)) for file in arguments.files]
        run = _run_two if len(atlases) == 2 else _run_matrix
        run(atlases, arguments.metric, as_json=arguments.json)
    return 0


def _run_two(atlases: Sequence[Atlas], metric: str, *, as_json: bool) -> None:
    import dataclasses

    from chanfmt.algebra.compare import compare, medians, shared_sequences

    first, second = atlases
    rows = compare(first, second, metric)
    for note in _notes(first, second):
        say(f"note: {note}")
    if as_json:
        framework.print_json(
            {
                "metric": metric,
                "first": _summary(first),
                "second": _summary(second),
                "shared_sequences": shared_sequences(first, second),
                "layers": [dataclasses.asdict(row) for row in rows],
                "median": medians(rows),
            }
        )
        return
    for name, atlas in (("A", first), ("B", second)):
        framework.print_wrapped(f"{name}  {_line(atlas)}", "   ")
    framework.print_line()
    framework.print_line(f"rank r is Spearman's correlation of {metric}")
    _print_rows(rows)


MATRICES = {
    "correlation": ("{metric}, Spearman's rank correlation over an FFN's channels", None),
    "top_jaccard": ("Jaccard index of the largest by {metric}", "top_chance"),
    "supernode_jaccard": ("Jaccard index of the supernodes", "supernode_chance"),
    "halo_jaccard": ("Jaccard index of the halos", "halo_chance"),
    "captured": (
        "{metric} of the row's atlas in the column's supernodes, divided by its {metric} in its own supernodes",
        "captured_chance",
    ),
}
"""Fields of `FFNComparison` printed for each pair as medians over FFNs: title, and the field with the value by chance."""


def _run_matrix(atlases: Sequence[Atlas], metric: str, *, as_json: bool) -> None:
    import itertools

    from chanfmt.algebra.compare import compare, medians, shared_sequences

    pairs = list(itertools.permutations(range(len(atlases)), 2))
    found = {}
    with progress_bar(len(pairs), "pair", "compare") as bar:
        for first, second in pairs:
            found[first, second] = medians(compare(atlases[first], atlases[second], metric))
            bar.update()
    notes = {
        (first, second): list(_notes(atlases[first], atlases[second]))
        for first, second in itertools.combinations(range(len(atlases)), 2)
    }
    names = [chr(ord("A") + place) if len(atlases) <= 26 else str(place + 1) for place in range(len(atlases))]
    for (first, second), texts in notes.items():
        for text in texts:
            say(f"note: {names[first]}, {names[second]}: {text}")
    if as_json:
        framework.print_json(
            {
                "metric": metric,
                "atlases": [_summary(atlas) for atlas in atlases],
                "pairs": [
                    {
                        "first": first,
                        "second": second,
                        "shared_sequences": shared_sequences(atlases[first], atlases[second]),
                        "median": values,
                    }
                    for (first, second), values in found.items()
                ],
            }
        )
        return
    for name, atlas in zip(names, atlases, strict=True):
        framework.print_wrapped(f"{name}  {_line(atlas)}", "   ")
    for key, (title, chance) in MATRICES.items():
        by_chance = "" if chance is None else f" (by chance {_range([values[chance] for values in found.values()])})"
        framework.print_line()
        framework.print_wrapped(f"{title.format(metric=metric)}{by_chance}; median over FFNs", "  ")
        framework.print_table(
            ("", *names),
            [
                (
                    names[row],
                    *("1" if row == column else significant(found[row, column][key], 3) for column in range(len(atlases))),
                )
                for row in range(len(atlases))
            ],
        )


def _range(values: list[float]) -> str:
    """Lowest and highest value, or one value if they print alike."""
    return span(*(significant(value, 2) for value in (min(values), max(values))))


def _summary(atlas: Atlas) -> dict[str, Any]:
    calibration, labels = atlas.calibration, atlas.labels
    return {
        "file": atlas.hub_source or str(atlas.path),
        "status": atlas.status,
        "content_sha256": atlas.content_sha256,
        "model": {
            "id": atlas.model.id,
            "revision": atlas.model.revision,
            "fingerprint": atlas.model.fingerprint,
            "dtype": atlas.model.dtype,
        },
        "calibration": {
            "sources": [row.source for row in calibration.contributions],
            "sequences": calibration.sequences,
            "seq_len": calibration.seq_len,
            "tokens": calibration.tokens,
        },
        "labels": {"rho": labels.rho, "eta": labels.eta, "support_size": labels.support_size, "score": labels.score},
    }


def _line(atlas: Atlas) -> str:
    data = _summary(atlas)
    model, calibration, labels = data["model"], data["calibration"], data["labels"]
    revision = f" at {model['revision'][:12]}" if model["revision"] else ""
    return (
        f"{data['file']}: {model['id']}{revision} in {model['dtype']}, {calibration['sequences']} x "
        f"{calibration['seq_len']} tokens of {', '.join(dict.fromkeys(calibration['sources']))}, "
        f"rho {labels['rho']:.4g}, eta {labels['eta']:.4g}"
    )


def _notes(first: Atlas, second: Atlas) -> Iterator[str]:
    """Facts about the pair that change how its numbers are read."""
    from chanfmt.algebra.compare import label_settings_note, shared_text_note, special_tokens_note

    if first.content_sha256 == second.content_sha256:
        yield "both files hold the same atlas"
        return
    if note := label_settings_note(first, second):
        yield note.sentence
    if first.calibration.metric_definition != second.calibration.metric_definition:
        yield (
            f"the metrics are defined differently: {first.calibration.metric_definition} and "
            f"{second.calibration.metric_definition}"
        )
    if first.model.fingerprint != second.model.fingerprint:
        yield "the weights differ"
    if first.model.dtype != second.model.dtype:
        yield (
            f"the models ran in {first.model.dtype} and {second.model.dtype}, and 16 bits change some labels, of the halo above all"
        )
    if note := special_tokens_note(first, second):
        yield note.sentence
    if note := shared_text_note(first, second):
        yield note.sentence


def _print_rows(rows: Sequence[FFNComparison]) -> None:
    from chanfmt.algebra.compare import medians

    several = len({row.stack for row in rows}) > 1
    headings = [
        "layer",
        *(["stack"] if several else []),
        "channels",
        "rank r",
        "super A",
        "super B",
        "shared",
        "Jaccard",
        "by chance",
        "captured",
        "halo Jacc",
        "by chance",
    ]

    def numbers(values: dict[str, Any]) -> list[str]:
        captured = values["captured"]
        return [
            significant(values["supernode_jaccard"], 3),
            significant(values["supernode_chance"], 2),
            "-" if captured != captured else f"{captured:.1%}",
            significant(values["halo_jaccard"], 3),
            significant(values["halo_chance"], 2),
        ]

    table = [
        [
            str(row.layer),
            *([row.stack] if several else []),
            f"{row.channels:,}",
            significant(row.correlation, 4),
            str(row.supernodes_first),
            str(row.supernodes_second),
            str(row.supernodes_shared),
            *numbers(vars(row)),
        ]
        for row in rows
    ]
    middle = medians(rows)
    table.append(["median", *([""] if several else []), "", significant(middle["correlation"], 4), "", "", "", *numbers(middle)])
    spare = ("channels", "super A", "super B", "shared")
    framework.print_table(headings, table, [*map(headings.index, spare), len(headings) - 1])
