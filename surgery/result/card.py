"""The model card of a cut checkpoint."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from chanfmt.base.hub_ids import is_hub_id
from chanfmt.base.markdown import code, fenced, inline, table
from chanfmt.base.text import beginning, one_line, perplexity_text
from chanfmt.data.text import ALIASES
from chanfmt.models.own import CONFIGURATION_FILE, MODELING_FILE, NARROWED_FILE
from chanfmt.models.source import TEMPLATE_DIRECTORY
from surgery.planning.layouts import CUSTOM, DECI, needs_code, readers
from surgery.planning.methods import METHODS
from surgery.planning.plan import layer_rows
from surgery.recovery.options import GRADIENTS, RECOVERIES
from surgery.result.base import NOTICE_FILE
from surgery.result.names import ATLAS_FILE, EVALUATION_FILE, IMATRIX_FILE, KEPT_FILE, PICTURE_FILE, REPORT_FILE
from surgery.result.record import summary_rows
from surgery.result.verdict import LIMITS, loss_table

if TYPE_CHECKING:
    from surgery.result.evaluated import Evaluated, Measured
    from surgery.result.record import Report

TAGS = ("pruned", "structured-pruning", "ffn-pruning", "chanfmt")

# The Hub knows four relations to a base model. An adapter needs its base to load, a merge has several bases, and a quantized
# model keeps every weight in fewer bits. A finetune has weights of its own, as a cut model has.
RELATION = "finetune"

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModel": "feature-extraction",
}
"""Name of the class that loads a model to the Hub's name of its task. The Hub has no name for text to text in general."""

UNVERIFIED = "Not verified"
"""Words in the card of every result whose logits were not compared."""

_ANSWER = 180
"""Characters of an answer that the card shows: a cell of a table holds little more."""
_SEAL = "<!-- written by surgery; sha256 of the lines above: "


def model_card(report: Report, name: str, evaluated: Evaluated | None = None) -> str:
    """Markdown with front matter: what the model is, what was removed, how it was checked, how to load and reproduce it.

    The last line is a digest of the other lines. From it, `is_edited` tells whether somebody changed the card.

    Args:
        name: Repository, or name of the output directory.
        evaluated: Numbers that were measured for the result.
    """
    plan, base = report.plan, report.base
    title = name.rsplit("/", 1)[-1]
    text = "\n".join(
        [
            "---",
            _front_matter(report, title, evaluated),
            "---",
            "",
            f"# {inline(title)}",
            "",
            f"**{inline(report.sizes.headline)}**",
            "",
            f"{code(base.id)} with {plan.sparsity_reached:.1%} of its feed-forward (FFN) channels removed. "
            f"{_form(report)} {_loaded_by(report)} {_weights(report)}",
            "",
            *(
                [
                    f"**{UNVERIFIED}:** logits were not compared with those of the masked dense model ({inline(report.logits_skipped)}).",
                    "",
                ]
                if report.logits is None
                else []
            ),
            f"![Share of the LP of every FFN that the cut removes]({PICTURE_FILE})",
            "",
            "## What was removed",
            "",
            *_removal(report),
            "",
            "## Evaluation",
            "",
            *_verdict(report),
            *_evaluation(report, evaluated),
            "",
            "## Load",
            "",
            *_loading(report, name),
            "",
            "## Reproduce",
            "",
            *_making(report),
            "",
            "## Licence",
            "",
            *_licence(report),
            "",
        ]
    )
    return f"{text}\n{_seal(text)}\n"


def is_edited(card: str) -> bool:
    """Whether ``card`` differs from what `model_card` wrote."""
    text, _, seal = card.removesuffix("\n").rpartition("\n")
    return seal != _seal(text)


def _seal(text: str) -> str:
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->"


def _front_matter(report: Report, title: str, evaluated: Evaluated | None) -> str:
    from huggingface_hub import ModelCardData

    base = report.base
    fields: dict[str, Any] = {}
    # The Hub refuses a card with another name.
    if base.source == "hub" and is_hub_id(base.id):
        fields = {"base_model": base.id, "base_model_relation": RELATION}
    if evaluated and evaluated.result.perplexity is not None:
        fields |= {"model_name": one_line(title), "eval_results": [_eval_result(evaluated, evaluated.result.perplexity)]}
    return ModelCardData(
        **fields,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(report.loader),
        tags=[*TAGS, *(["gguf"] if report.gguf else [])],
        license=one_line(base.license) or None,
        license_name=one_line(base.license_name) or None,
        license_link=one_line(base.license_link) or None,
    ).to_yaml()


def _eval_result(evaluated: Evaluated, perplexity: float) -> Any:
    from huggingface_hub import EvalResult

    name = one_line(evaluated.data)
    data, config, splits = ALIASES.get(name, (name, None, {}))
    return EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=name,
        dataset_config=config,
        dataset_split=splits.get("evaluate"),
        metric_type="perplexity",
        metric_value=perplexity,
        metric_name=f"perplexity, protocol {one_line(evaluated.protocol)}, blocks of {evaluated.seq_len} tokens",
    )


_MEANING = (
    "LP is the loss proxy 1/2 E[(u dL/du)^2]. Supernodes are the channels with the highest LP of each layer. The kept LP mass is a "
    "proxy for the loss, not a perplexity: evaluate the model on your own data before you use it."
)
_MEANING_WITHOUT_LP = (
    "The atlas holds no LP, the proxy for the loss. Supernodes are the channels of each layer that the atlas ranks first: evaluate "
    "the model on your own data before you use it."
)


def _removal(report: Report) -> list[str]:
    plan = report.plan
    method = METHODS.get(plan.method)
    formula = f" ({method.description}; {method.source})" if method else ""
    supernodes, kept = (sum(getattr(block, name) for block in plan.blocks) for name in ("supernodes", "supernodes_kept"))
    retention = f" {kept:,} of {supernodes:,} supernodes are kept ({kept / supernodes:.1%})." if supernodes else ""
    return [
        f"The channels with the {'highest' if plan.invert else 'lowest'} scores were removed. The method is "
        f"{code(plan.method)}{formula}. The scores come from an importance atlas, which was measured on: {inline(plan.calibration)}."
        f"{retention}",
        "",
        table(["", ""], summary_rows(plan, report)),
        "",
        _MEANING if any(block.lp_kept is not None for block in plan.blocks) else _MEANING_WITHOUT_LP,
        "",
        "<details><summary>Every layer</summary>",
        "",
        table(*layer_rows(plan)),
        "",
        "</details>",
    ]


def _evaluation(report: Report, evaluated: Evaluated | None) -> list[str]:
    if evaluated is None:
        return ["No perplexity was measured. `surgery eval` measures the perplexity of this model and its base on the same text."]
    rows = [*([("dense", evaluated.dense)] if evaluated.dense else []), ("pruned", evaluated.result)]
    numbers = evaluated.result
    bos = any(item.perplexity_with_bos is not None for _, item in rows)
    lines = [
        table(
            ["", "perplexity", "nats/token", "std err", "bits/byte", *(["perplexity, BOS before every block"] if bos else [])],
            [[name, *_numbers(item), *([_with_bos(item)] if bos else [])] for name, item in rows],
        ),
        "",
        f"On {code(evaluated.data)}, protocol {code(evaluated.protocol)}: {numbers.tokens:,} tokens in "
        f"{numbers.blocks:,} blocks of {evaluated.seq_len:,}, {numbers.predicted:,} predicted; {inline(evaluated.statement)}. "
        f"`{EVALUATION_FILE}` has all digits.",
    ]
    scores = [
        {
            (task["task"], task["metric"], task["filter"]): "-" if task["value"] is None else f"{task['value']:.4f}"
            for task in item.tasks
        }
        for _, item in rows
    ]
    keys = list(dict.fromkeys(key for found in scores for key in found))
    if keys:
        lines += [
            "",
            table(
                ["task", "metric", "filter", *(name for name, _ in rows)],
                [[*key, *(found.get(key, "-") for found in scores)] for key in keys],
            ),
        ]
    return lines


def _verdict(report: Report) -> list[str]:
    """What the model is good for, with the losses and the answers behind it."""
    verdict = report.verdict
    if verdict is None:
        return []
    limits = "; ".join(f"up to {limit:g}: {words}" for limit, words in LIMITS[:-1])
    lines = [
        f"**Verdict: {inline(verdict.words)}.** The largest loss above the dense model's is {verdict.nats:+.3f} nats per token, "
        f"on {inline(verdict.text)}. (By convention, {limits}; above: {LIMITS[-1][1]}.)",
        "",
        table(*loss_table(verdict)),
        "",
    ]
    if verdict.answers:
        lines += [
            table(
                ["prompt", "dense model", "this model"],
                [[beginning(text, _ANSWER) for text in (item.prompt, item.dense, item.result)] for item in verdict.answers],
            ),
            "",
        ]
    return lines


def _with_bos(item: Measured) -> str:
    return "-" if item.perplexity_with_bos is None else perplexity_text(item.perplexity_with_bos)


def _numbers(item: Measured) -> list[str]:
    others = (item.nll, item.nll_standard_error, item.bits_per_byte)
    return [perplexity_text(item.perplexity), *("-" if value is None else f"{value:.4f}" for value in others)]


def _loading(report: Report, name: str) -> list[str]:
    place = fenced(json.dumps(one_line(name)))
    if report.gguf is not None:
        return _loading_gguf(report.gguf.file, place)
    names = {file for file in report.files if not file.startswith(TEMPLATE_DIRECTORY)}
    reader = ("AutoProcessor", "processor") if names & {"preprocessor_config.json", "processor_config.json"} else None
    if reader is None and any(file.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for file in names):
        reader = ("AutoTokenizer", "tokenizer")
    loader = report.loader if report.loader.isidentifier() else "AutoModel"
    return [
        "```python",
        f"from transformers import {', '.join([loader, *([reader[0]] if reader else [])])}",
        "",
        f"model = {loader}.from_pretrained({place}{', trust_remote_code=True' if needs_code(report.plan.layout) else ''})",
        *([f"{reader[1]} = {reader[0]}.from_pretrained({place})"] if reader else []),
        "```",
        *(["", _engines(report)] if report.plan.layout == DECI else []),
    ]


def _loading_gguf(file: str, place: str) -> list[str]:
    name = fenced(json.dumps(one_line(file)))
    return [
        "llama.cpp and its relatives read the file as it is. transformers reads it dequantised:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({place}, gguf_file={name})",
        f"tokenizer = AutoTokenizer.from_pretrained({place}, gguf_file={name})",
        "```",
    ]


def _making(report: Report) -> list[str]:
    plan = report.plan
    atlas = (
        f"`{ATLAS_FILE}` is the atlas, with "
        if ATLAS_FILE in report.files
        else "The atlas is not part of this repository; it has "
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    matrix = (
        f"`{IMATRIX_FILE}` is the importance matrix of the kept channels. `llama-quantize --imatrix {IMATRIX_FILE} IN.gguf OUT.gguf "
        "IQ4_XS` takes it. "
    )
    return [
        *(["```sh", fenced(report.command), "```", ""] if report.command else []),
        f"{atlas}content SHA-256 {code(plan.atlas_sha256)}. `{KEPT_FILE}` lists the kept channels and is a plan: "
        f"`surgery apply {KEPT_FILE} --model MODEL -o DIR` makes the same cut. `{REPORT_FILE}` holds all other details, with the "
        f"SHA-256 of every file. {matrix if IMATRIX_FILE in report.files else ''}This model was made with {inline(versions)}.",
    ]


def _licence(report: Report) -> list[str]:
    base = report.base
    name = base.license_name or base.license
    if not name:
        return [f"The card of {code(base.id)} names no licence."]
    where = f" ({inline(base.license_link)})" if base.license_link else ""
    lines = [f"This model has the licence of {code(base.id)}: {inline(name)}{where}."]
    if base.terms:
        lines += [
            "",
            f"{base.terms.statement + '. ' if base.terms.statement else ''}{base.terms.notice.removesuffix('.')}. "
            f"The weights were modified as described above. See `{NOTICE_FILE}`.",
        ]
    return lines


def _loaded_by(report: Report) -> str:
    if report.plan.layout == DECI:
        return (
            f"Every layer has an FFN width of its own, as in DeciLM (Nemotron-NAS) models. transformers loads the result with "
            f"`trust_remote_code=True`, which runs `{MODELING_FILE}` and `{CONFIGURATION_FILE}`."
        )
    if report.plan.layout == CUSTOM:
        return (
            f"FFNs have widths of their own, which `narrowed_ffns` in `config.json` lists. transformers loads the result with "
            f"`trust_remote_code=True`, which runs `{NARROWED_FILE}`: it builds the stock class and narrows its FFNs. Without it, "
            "transformers builds the stock class and reports tensors of other sizes."
        )
    return "Stock transformers code loads the result."


def _engines(report: Report) -> str:
    """Which other programs read the result, as their code says."""
    names, limit = readers(report.plan.model_config, list(report.applied.widths.values()))
    text = (
        f"Besides transformers, the code of {', '.join(names)} reads the widths from `block_configs` in `config.json` "
        "(the architecture `DeciLMForCausalLM`, the model type `nemotron-nas`); vLLM needs `--trust-remote-code`."
    )
    return text + (f" {limit[:1].upper()}{limit[1:]}." if limit else "")


def _form(report: Report) -> str:
    """One or two sentences on how the files show the removal."""
    if needs_code(report.plan.layout) and not report.padded:
        return "The channels are really removed, not set to zero."
    fields = ", ".join(f"{code(field)} is {inline(str(change.after))}" for field, change in report.config_fields.items())
    place = f"the metadata of {code(report.gguf.file)}, by llama.cpp's names" if report.gguf else "`config.json`"
    if not report.padded:
        return f"The channels are really removed, not set to zero: {fields} in {place}."
    zeros = f"Stock code cannot load {len(report.padded)} FFNs at their own widths, so they are padded with zero channels."
    return f"{zeros} {fields[:1].upper()}{fields[1:]} in {place}." if fields else zeros


def _weights(report: Report) -> str:
    rounded = f"All weights are rounded to {report.dtype}." if report.dtype else ""
    if report.gguf is not None and report.gguf.weight_error:
        rounded = "The weights of the cut that lie across blocks of the quantised type are quantised again."
        if report.gguf.converted:
            rounded = "The weights are rounded to the types of the GGUF file."
    if report.recovery is None:
        return f"{rounded} Nothing was trained." if rounded else "The kept weights are unchanged, and nothing was trained."
    what = RECOVERIES[report.recovery.method]
    gradient = "" if report.recovery.method in GRADIENTS else "No gradient was computed."
    return " ".join(text for text in (f"{what[:1].upper()}{what[1:]}.", gradient, rounded) if text)
