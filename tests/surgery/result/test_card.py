"""The model card: what the Hub reads, what people read, and what must not be in the card."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
import transformers
from huggingface_hub import ModelCard

from chanfmt.base.command_line import portable_command
from chanfmt.base.errors import CheckError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.planning.options import PlanOptions
from surgery.planning.plan import PlannedModel, make_plan
from surgery.planning.sizes import parameters_text
from surgery.result.base import Base, read_base
from surgery.result.card import is_edited, model_card
from surgery.result.evaluated import Evaluated, load_evaluated, take_evaluation
from surgery.result.picture import layer_picture
from surgery.result.result import check_unchanged, open_result
from tests.support.cut_models import content_for, save_atlas, save_model
from tests.support.heard import heard
from tests.support.hostile import HOSTILE, LONG, check_markdown
from tests.support.measured import Tiny, make_tiny

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = make_tiny(tmp_path_factory.mktemp("tiny"), "llama")
    front = "license: other\nlicense_name: tiny-terms\nlicense_link: LICENSE.md"
    (made.model / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
    (made.model / "LICENSE.md").write_text("Do with it what you like.\n")
    config = json.loads((made.model / "config.json").read_text())
    (made.model / "config.json").write_text(json.dumps(config | {"_name_or_path": str(made.model)}))
    tokenizer = json.loads((made.model / "tokenizer_config.json").read_text())
    (made.model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": str(made.model)}))
    return made


def surgery(*arguments: object) -> None:
    """Run a command as if this process had been started with it."""
    before, sys.argv = sys.argv, ["surgery", *map(str, arguments)]
    try:
        assert main(sys.argv[1:]) == 0
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def cut(tiny: Tiny) -> Path:
    output = tiny.model.parent / "small"
    surgery("prune", tiny.atlas, "--model", tiny.model, "--sparsity", "0.5", "--method", "wanda", "-o", output, "--quiet")
    return output


@pytest.fixture(scope="module")
def evaluation(tiny: Tiny, cut: Path) -> Path:
    """The output of ``surgery eval --json`` on the dense model and the result."""
    path = tiny.model.parent / "evaluation-output.json"
    with path.open("w") as stream, contextlib.redirect_stdout(stream):
        surgery("eval", tiny.model, cut, "--data", tiny.text, "--seq-len", "48", "--max-tokens", "200", "--json", "--quiet")
    return path


def take(path: Path, cut: Path) -> Evaluated:
    value = json.loads(path.read_text())
    dense, pruned = (item["fingerprint"] for item in value["models"])
    assert dense == open_result(cut).report.applied.fingerprint
    return take_evaluation(path, pruned, dense)


def test_the_front_matter_is_what_the_hub_reads(cut: Path, tmp_path: Path) -> None:
    fields = ModelCard.load(cut / "README.md").data.to_dict()
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny-terms",
        "license_link": "LICENSE.md",
        "tags": ["pruned", "structured-pruning", "ffn-pruning", "chanfmt"],
    }
    assert (cut / "LICENSE.md").is_file()


@pytest.mark.parametrize(("model", "relation"), [("meta-llama/Llama-3.1-8B", "finetune"), ("no--id at all", None)])
def test_a_model_of_the_hub_is_the_base(tmp_path: Path, model: str, relation: str | None) -> None:
    directory = save_model("llama", tmp_path / "model")
    (directory / "README.md").write_text("---\nlicense: [llama3.1]\n---\n")
    with Atlas.open(save_atlas("llama", directory, tmp_path / "atlas.h5", source="hub", revision="c0ffee")) as atlas:
        plan = make_plan(atlas, PlanOptions(0.5))
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, id=model))
    apply_plan(plan, ModelSource(directory), tmp_path / "out", CutOptions(verify=False))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.get("base_model") == (model if relation else None)
    assert card.data.get("base_model_relation") == relation
    assert card.data.license == "llama3.1"
    assert f"{model} @ c0ffee" in card.text
    assert "**Not verified:** logits were not compared with those of the masked dense model (--no-verify)." in card.text
    assert "Built with Llama. Llama 3.1 is licensed under the Llama 3.1 Community License" in card.text
    assert "Llama 3.1 is licensed under" in (tmp_path / "out" / "NOTICE").read_text()


def test_what_people_read(tiny: Tiny, cut: Path) -> None:
    card = (cut / "README.md").read_text()
    report = open_result(cut).report
    lost = sum(block.supernodes - block.supernodes_kept for block in report.plan.blocks)
    total = sum(block.supernodes for block in report.plan.blocks)
    assert f"{total - lost:,} of {total:,} supernodes are kept" in card
    assert "No perplexity was measured" in card
    assert "\nsurgery prune atlas.h5 --model model --sparsity 0.5 --method wanda -o small --quiet\n" in card
    with Atlas.open(cut / "atlas.h5") as atlas:
        assert f"`atlas.h5` is the atlas, with content SHA-256 `{atlas.content_sha256}`" in card
    assert f"transformers {transformers.__version__}" in card
    assert 'AutoTokenizer.from_pretrained("small")' in card
    assert "0.0001 allowed" in card
    assert "This model has the licence of `model`: tiny-terms (LICENSE.md)." in card
    code = re.search(r"```python\n(.*?)```", model_card(report, str(cut)), re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["model"].config.intermediate_size == report.plan.blocks[0].n_kept


def test_the_plan_that_travels_cuts_the_same(tiny: Tiny, cut: Path, tmp_path: Path) -> None:
    surgery("apply", cut / "kept_channels.safetensors", "--model", tiny.model, "-o", tmp_path / "again", "--quiet")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert "The atlas is not part of this repository; it has content SHA-256" in (tmp_path / "again" / "README.md").read_text()


def test_the_picture_shows_every_layer(cut: Path) -> None:
    root = ElementTree.parse(cut / "layers.svg").getroot()
    bars = [item for item in root.iter("{http://www.w3.org/2000/svg}rect") if item.get("fill") != "#ffffff"]
    report = open_result(cut).report
    heights = [float(bar.get("height", "")) for bar in bars]
    lost = [1 - block.lp_kept for block in report.plan.blocks if block.lp_kept is not None]
    assert len(heights) == len(lost) == len(report.plan.blocks)
    # The axis ends at a round share just above the largest one.
    texts = [item.text or "" for item in root.iter("{http://www.w3.org/2000/svg}text")]
    end = max(float(text[:-1]) / 100 for text in texts if text.endswith("%") and text[:-1].replace(".", "").isdigit())
    assert max(lost) <= end <= 2.5 * max(lost)
    assert heights == pytest.approx([150 * share / end for share in lost], abs=0.01)
    assert any(f"most {max(lost):.1%}" in text for text in texts)


def test_the_picture_counts_lost_supernodes_and_does_without_lp(tiny: Tiny, cut: Path) -> None:
    plan = open_result(cut).report.plan
    first, *rest = plan.blocks
    first = dataclasses.replace(first, supernodes=3, supernodes_kept=1, lp_kept=None)
    rest = [dataclasses.replace(block, supernodes=2, supernodes_kept=2, lp_kept=None) for block in rest]
    root = ElementTree.fromstring(layer_picture(dataclasses.replace(plan, blocks=(first, *rest))))
    texts = [item.text or "" for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("2") == 1 + (len(rest) >= 2)
    assert any("channels that the cut removes" in text for text in texts)
    assert any(f"2 of {3 + 2 * len(rest)} supernodes (in red)" in text for text in texts)
    assert "](layers.svg)" in (cut / "README.md").read_text()


def test_no_directory_of_this_machine_travels(tiny: Tiny, cut: Path) -> None:
    private = {str(tiny.model.parent), str(Path.home()) + "/", f"/{getpass.getuser()}/", str(Path.cwd())}
    for file in cut.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [text for text in private if text.encode() in content], file


@pytest.mark.parametrize(
    ("command", "carried"),
    [
        ("atlas build me/model -o a.h5", True),
        ("atlas build /home/me/model -o a.h5", False),
        ("atlas build me/model --calib=~/mine.txt", False),
        ("it's /home/me/no shell's", False),
    ],
)
def test_an_atlas_that_tells_directories_stays_here(tmp_path: Path, command: str, carried: bool) -> None:
    directory = save_model("llama", tmp_path / "model")
    content = content_for("llama", directory)
    atlas = tmp_path / "atlas.h5"
    write_atlas(dataclasses.replace(content, producer=dataclasses.replace(content.producer, command=command)), atlas)
    with Atlas.open(atlas) as opened:
        plan = make_plan(opened, PlanOptions(0.5))
        with heard() as said:
            apply_plan(plan, ModelSource(directory), tmp_path / "out", CutOptions(verify=False), atlas=opened)
    assert (tmp_path / "out" / "atlas.h5").is_file() is carried
    assert any("names directories" in text for text in said) is not carried


def test_evaluated_numbers(cut: Path, evaluation: Path, tmp_path: Path) -> None:
    numbers = take(evaluation, cut)
    value = json.loads(evaluation.read_text())
    assert numbers.data == "text.txt"
    card = model_card(open_result(cut).report, "someone/small", numbers)
    for item, name in zip(value["models"], ("dense", "pruned"), strict=True):
        assert f"| {name} | {item['perplexity']:,.2f} | {item['nll']:.4f} |" in card
    assert f"On `text.txt`, protocol `paper`: 200 tokens in 5 blocks of 48, {value['models'][1]['predicted']} predicted" in card
    (tmp_path / "README.md").write_text(card)
    result = ModelCard.load(tmp_path / "README.md").data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("perplexity", value["models"][1]["perplexity"])
    (tmp_path / "evaluation.json").write_text(json.dumps(numbers.to_json()))
    assert load_evaluated(tmp_path / "evaluation.json") == numbers


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value["models"].pop(), "holds no evaluation of this result"),
        (lambda value: value.pop("models"), "not an output of surgery eval"),
        (lambda value: value["models"][1].update(perplexity="12"), "perplexity is not valid"),
        (lambda value: value.update(protocol="paper"), "not an output of surgery eval"),
        (lambda value: value["models"][1].update(tasks=[{"task": "a"}]), "not an output of surgery eval"),
        (
            lambda value: value["models"][1].update(tasks=[{"task": "a", "metric": "b", "filter": "c", "value": "1\n# d"}]),
            "not an output of surgery eval",
        ),
    ],
)
def test_numbers_of_something_else(cut: Path, evaluation: Path, tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    value = json.loads(evaluation.read_text())
    pruned = value["models"][1]["fingerprint"]
    edit(value)
    (tmp_path / "e.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=message):
        take_evaluation(tmp_path / "e.json", pruned, "")


def test_numbers_on_other_tokens_are_no_comparison(cut: Path, evaluation: Path, tmp_path: Path) -> None:
    value = json.loads(evaluation.read_text())
    value["models"][0]["tokens_sha256"] = "0" * 64
    (tmp_path / "e.json").write_text(json.dumps(value))
    assert take(tmp_path / "e.json", cut).dense is None


def test_an_edited_card_is_told(cut: Path) -> None:
    card = (cut / "README.md").read_text()
    assert not is_edited(card)
    assert is_edited(card.replace("# small", "# My small model"))
    assert is_edited("# Mine\n")
    assert is_edited("")


def test_a_result_reads_back_as_it_was_written(cut: Path) -> None:
    result = open_result(cut)
    check_unchanged(result)
    assert json.loads(json.dumps(result.report.to_json())) == json.loads((cut / "surgery.json").read_text())
    assert model_card(result.report, "small") == (cut / "README.md").read_text()
    assert result.strangers == []


@pytest.mark.parametrize("how", ["lstsq", "bias", "distill"])
def test_a_recovered_result_reads_back_too(tiny: Tiny, tmp_path: Path, how: str) -> None:
    surgery("prune", tiny.atlas, "--model", tiny.model, "--sparsity", "0.5", "--recover", how, "-o", tmp_path / "out", "--quiet")
    result = open_result(tmp_path / "out")
    check_unchanged(result)
    assert json.loads(json.dumps(result.report.to_json())) == json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert model_card(result.report, "out") == (tmp_path / "out" / "README.md").read_text()


def broken(cut: Path, copy: Path) -> Path:
    shutil.copytree(cut, copy)
    return copy


def test_a_changed_result_is_told(cut: Path, tmp_path: Path) -> None:
    copy = broken(cut, tmp_path / "copy")
    (copy / "secrets.txt").write_text("x")
    assert open_result(copy).strangers == ["secrets.txt"]
    check_unchanged(open_result(copy))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckError, match=r"model\.safetensors has changed since"):
        check_unchanged(open_result(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckError, match=r"model\.safetensors is missing"):
        check_unchanged(open_result(copy))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value.update(format="surgery-restore/1"), "not a result of surgery prune or apply"),
        (lambda value: value["files"].update({"../x": {"bytes": 1, "sha256": "0"}}), "leads out of its directory"),
        (lambda value: value.pop("files"), "is damaged"),
        (lambda value: value["base"].update(license=["mit"]), "license is not valid"),
        (lambda value: value["checks"]["logits"].update(extra=1), "is damaged"),
        (lambda value: value["checks"]["logits"].update(count="9"), "count is not valid: expected int, got str"),
        (lambda value: value["checks"]["shapes"].update(extra=1), "checks.shapes is not valid: .*extra"),
        (lambda value: value["checks"].update(logits=3), "is damaged"),
        (lambda value: value["files"].update(x={"bytes": "1", "sha256": "0"}), "bytes is not valid: expected int, got str"),
        (lambda value: value["parameters"].update(after=1.5), "parameters.after is not valid: expected int, got float"),
        (lambda value: value.update(format=["surgery/1"]), "format is not valid"),
        (lambda value: value.update(recovery={"method": "lstsq", "tokens": 1, "layers": [{}], "logit_error": None}), "layers"),
    ],
)
def test_damaged_records(cut: Path, tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    copy = broken(cut, tmp_path / "copy")
    value = json.loads((copy / "surgery.json").read_text())
    edit(value)
    (copy / "surgery.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=message):
        open_result(copy)


def test_keys_of_later_versions_are_skipped(cut: Path, tmp_path: Path) -> None:
    copy = broken(cut, tmp_path / "copy")
    value = json.loads((copy / "surgery.json").read_text())
    (copy / "surgery.json").write_text(json.dumps(value | {"news": [1], "base": value["base"] | {"news": 1}}))
    assert open_result(copy).report.to_json() == open_result(cut).report.to_json()


def test_results_say_what_they_are(cut: Path) -> None:
    result = open_result(cut)
    sizes = result.report.sizes
    assert repr(result) == f"<Result in {str(cut)!r}: model, {parameters_text(*sizes.parameters)}>"
    assert sizes.config == ("intermediate_size 44 to 24",)
    # The card begins with the size.
    after_title = (cut / "README.md").read_text().split("\n# ")[1].splitlines()[2]
    assert after_title.replace("\\", "") == f"**{sizes.headline}**"


def test_a_directory_that_is_no_result(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"it has no surgery\.json"):
        open_result(tiny.model)


BASE = PlannedModel("someone/thing", "c0ffee", "hub", "llama", (), "")


@pytest.mark.parametrize(
    ("card", "files", "expected"),
    [
        ("---\nlicense: Apache-2.0\n---\n", (), ("apache-2.0", "", "")),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            (),
            ("other", "mine", "https://huggingface.co/someone/thing/blob/main/LICENSE"),
        ),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", ("LICENSE",), ("other", "mine", "LICENSE")),
        ("# no front matter\n", ("LICENSE.txt",), ("other", "my-licence-1.0", "LICENSE.txt")),
        ("---\nlicense: {a: b\n---\n", ("COPYING",), ("other", "my-licence-1.0", "COPYING")),
        ("---\nlicense: [a, b]\n---\n", (), ("", "", "")),
        ("", (), ("", "", "")),
    ],
)
def test_the_licence_of_the_base(tmp_path: Path, card: str, files: tuple[str, ...], expected: tuple[str, str, str]) -> None:
    (tmp_path / "README.md").write_text(card)
    for name in files:
        (tmp_path / name).write_text("\n  MY LICENCE 1.0\n\nText.\n")
    base = read_base(BASE, tmp_path)
    assert (base.license, base.license_name, base.license_link) == expected


@pytest.mark.parametrize(
    ("license", "name", "allowed"),
    [
        ("llama3.1", "Llama-3.1-8B-wanda-50", True),
        ("llama3.1", "tiny-wanda-50", False),
        ("llama3", "Llama-3-x", True),
        ("llama3", "Meta-Llama-3-8B", False),
        ("gemma", "anything", True),
        ("llama2", "anything", True),
    ],
)
def test_names_that_licences_ask_for(license: str, name: str, allowed: bool) -> None:
    terms = Base("x/y", "", "hub", license).terms
    assert terms is not None
    assert terms.allows(name) is allowed


def test_recorded_commands_have_no_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    command = portable_command(
        "surgery",
        [
            "prune",
            "/home/me/a.h5",
            "--model",
            "meta-llama/Llama-3.1-8B",
            "--calib=~/text.txt=3",
            "-o",
            "sub/out",
            "--protect",
            "decoder/1:7",
            "--protect",
            "../p.json@0-3",
            "hf://datasets/me/atlas/a.h5",
            "--sparsity",
            "0.5",
            "..",
        ],
    )
    assert command == (
        "surgery prune a.h5 --model meta-llama/Llama-3.1-8B --calib=text.txt=3 -o out --protect decoder/1:7 "
        "--protect p.json@0-3 hf://datasets/me/atlas/a.h5 --sparsity 0.5 .."
    )


@pytest.mark.parametrize("text", [HOSTILE, LONG], ids=["forged", "long"])
def test_the_card_has_no_markup_of_a_plan_a_record_or_an_evaluation(cut: Path, evaluation: Path, text: str) -> None:
    report = open_result(cut).report
    base = Base(text, text, "hub", text, text, text)
    plan = dataclasses.replace(
        report.plan,
        model=dataclasses.replace(report.plan.model, id=text, revision=text),
        method=text,
        calibration=text,
        atlas_sha256=text,
        atlas_source=text,
        allocation=text,
        blocks=tuple(dataclasses.replace(block, module=text, stack=text) for block in report.plan.blocks),
    )
    evaluated = take(evaluation, cut)
    task = {"task": text, "metric": text, "filter": text, "value": 0.5}
    evaluated = dataclasses.replace(
        evaluated, data=text, protocol=text, statement=text, result=dataclasses.replace(evaluated.result, tasks=(task,))
    )
    for logits in (report.logits, None):
        hostile = dataclasses.replace(
            report,
            plan=plan,
            base=base,
            logits=logits,
            logits_skipped=text,
            versions={text: text},
            command=text,
            loader=text,
        )
        card = model_card(hostile, text, evaluated)
        check_markdown(card)
